"""Text to text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnbook.models import T5, T5Config, greedy_decode
from helpers import complains, copy_renamed, count_parameters, hugging_face, learn, published, reach_all, tokens

SMALL = {"vocab_size": 13, "width": 16, "depth": 2, "num_heads": 4, "num_buckets": 8, "max_distance": 20}
VARIANTS = {
    "published": T5Config(**SMALL),
    "1.1": T5Config.version_1_1(**SMALL, head_dim=3, hidden=20),
}
RENAMED = {
    r"^shared": "embedding",
    r"^(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight": r"\1_bias.table",
    r"^(encoder|decoder)\.final_layer_norm": r"\1_norm",
    r"^(encoder|decoder)\.block": r"\1",
    r"layer\.0\.SelfAttention": "attention",
    r"layer\.0\.layer_norm": "attention_norm",
    r"^(decoder\.\d+)\.layer\.1\.EncDecAttention": r"\1.cross",
    r"^(decoder\.\d+)\.layer\.1\.layer_norm": r"\1.cross_norm",
    r"layer\.\d\.DenseReluDense\.wi_0": "feed_forward.gate",
    r"layer\.\d\.DenseReluDense\.(wi|wi_1)\b": "feed_forward.up",
    r"layer\.\d\.DenseReluDense\.wo": "feed_forward.down",
    r"layer\.\d\.layer_norm": "feed_forward_norm",
    r"\.(q|k|v)\.weight": r".\1_proj.weight",
    r"\.o\.weight": ".out_proj.weight",
    r"^lm_head": "output",
}


def theirs_like(config: T5Config) -> nn.Module:
    """Build Hugging Face's model of the same shape."""
    transformers = hugging_face()
    made = transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.width, d_kv=config.head_dim or config.width // config.num_heads,
        d_ff=config.hidden or 4 * config.width, num_layers=config.depth, num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets, relative_attention_max_distance=config.max_distance,
        feed_forward_proj="relu" if config.tie else "gated-gelu", tie_word_embeddings=config.tie,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(made)
    if not config.tie:  # the package ties them always, though the published weights of 1.1 are two matrices
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (T5Config(32128, 512, 6, 8), 60_506_624),
        (T5Config(32128, 768, 12, 12), 222_903_552),
        (T5Config.version_1_1(32128, 512, 8, 6, head_dim=64, hidden=1024), 76_961_152),
    ],
    ids=["small", "base", "1.1 small"],
)
def test_published_configurations_have_their_number_of_parameters(config, count):
    assert config.num_parameters() == count
    with torch.device("meta"):
        assert count_parameters(theirs_like(config)) == count


@torch.no_grad()
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_outputs_are_hugging_faces(config):
    theirs = published(lambda: theirs_like(config))
    for side in (theirs.encoder, theirs.decoder):  # what our model has once, theirs does too
        assert [hasattr(b.layer[0].SelfAttention, "relative_attention_bias") for b in side.block] == [True, False]
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        assert torch.equal(theirs.state_dict()[name], theirs.shared.weight)
    state = {name: x for name, x in theirs.state_dict().items() if "embed_tokens" not in name}
    ours = copy_renamed(T5(config), _Holder(state), RENAMED)
    source, target = tokens(3, 40, low=1, high=13), tokens(3, 30, high=13, seed=1)
    source[1, 25:] = 0
    expected = theirs(
        input_ids=source,
        attention_mask=(source != 0).long(),
        decoder_input_ids=target,
        output_hidden_states=True,
        output_attentions=True,
    )
    state, trace = ours.encode(source, return_trace=True)
    real = (source != 0)[..., None]
    within = {"atol": 2e-5, "rtol": 1e-4}
    for mine, other in zip(trace.weights, expected.encoder_attentions, strict=True):
        torch.testing.assert_close(mine * real[:, None], other * real[:, None], **within)
    torch.testing.assert_close(state.memory * real, expected.encoder_last_hidden_state * real, **within)
    logits, trace = ours.decode(target, state, return_trace=True)
    for mine, other in zip(trace.weights, expected.decoder_attentions, strict=True):
        torch.testing.assert_close(mine, other, **within)
    for mine, other in zip(trace.cross_weights, expected.cross_attentions, strict=True):
        torch.testing.assert_close(mine, other, **within)
    torch.testing.assert_close(logits, expected.logits, **within)
    torch.testing.assert_close(ours(source, target), expected.logits, **within)  # without a trace: sdpa


class _Holder:
    """A state without a model."""

    def __init__(self, state):
        self._state = state

    def state_dict(self):
        return self._state


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_formula_counts_the_parameters(config):
    model = T5(config)
    assert count_parameters(model) == config.num_parameters()
    assert (model.output.weight is model.embedding.weight) == config.tie
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_decoder_is_causal_and_sees_every_real_source_token(config):
    model = T5(config).double()
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    source, target = tokens(2, 7, low=1, high=13), tokens(2, 6, high=13)
    source[1, 4:] = 0
    logits = model(source, target)
    for i in range(6):
        to_source, to_target = torch.autograd.grad(logits[:, i].square().sum(), embedded, retain_graph=True)
        assert torch.equal(to_source.abs().sum(-1) > 0, source != 0)
        assert torch.equal((to_target.abs().sum(-1) > 0).all(0), torch.arange(6) <= i)


def test_gradients_reach_all_parameters():
    for config in VARIANTS.values():
        model = T5(config)
        logits = model(tokens(2, 30, low=1, high=13), tokens(2, 30, high=13, seed=1))
        reach_all(model, (logits * torch.randn_like(logits)).sum())


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_decoding_step_by_step_equals_the_full_pass(config):
    model = T5(config).eval()
    source, target = tokens(2, 9, low=1, high=13), tokens(2, 12, high=13)
    source[0, 5:] = 0
    with torch.no_grad():
        full, state, steps = model(source, target), model.encode(source), []
        for token in target.T:
            logits, state = model.decode_step(token, state)
            steps.append(logits)
        torch.testing.assert_close(torch.stack(steps, 1), full, atol=1e-5, rtol=1e-4)


def test_a_text_shifted_as_a_whole_reads_the_same():
    model, text = T5(VARIANTS["published"]).eval(), tokens(1, 6, low=1, high=13)
    behind = torch.cat([text, torch.zeros(1, 3, dtype=torch.int64)], 1)
    before = torch.cat([torch.zeros(1, 3, dtype=torch.int64), text], 1)
    with torch.no_grad():
        memory = model.encode(text).memory
        torch.testing.assert_close(model.encode(behind).memory[:, :6], memory, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.encode(before).memory[:, 3:], memory, atol=1e-5, rtol=1e-4)


def test_first_weights_leave_scores_of_about_unit_size():
    model = T5(T5Config(50, 256, 1, 4)).eval()
    part = model.encoder[0].attention
    assert part.scale == 1.0
    x = torch.randn(1, 200, 256)
    q, k = (p(x).unflatten(-1, (4, 64)).transpose(1, 2) for p in (part.q_proj, part.k_proj))
    assert (q @ k.transpose(-2, -1)).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_one_batch_can_be_learned_by_heart(config):
    model = T5(config)
    source, target = tokens(3, 6, low=2, high=13), tokens(3, 5, low=2, high=13, seed=1)
    target[:, -1] = 1
    given = torch.cat([torch.zeros(3, 1, dtype=torch.int64), target[:, :-1]], 1)
    loss = learn(
        model, lambda: nn.functional.cross_entropy(model(source, given).flatten(0, 1), target.flatten()), steps=100
    )
    assert loss < 0.1
    assert torch.equal(greedy_decode(model, source, start=0, end=1, max_length=5), target)


MODEL = T5(VARIANTS["published"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: T5Config(0, 1, 1, 1), "vocab_size: expected an integer ≥ 1, got 0"),
        (lambda: T5Config(**{**SMALL, "num_heads": 3}), "num_heads: expected a divisor of width = 16, got 3"),
        (lambda: T5Config(**SMALL, activation="tanh"), "activation: expected one of …, got 'tanh'"),
        (lambda: T5(T5Config(**{**SMALL, "num_buckets": 7})), "num_buckets: expected an even integer, got 7"),
        (lambda: MODEL.encode(tokens(3, high=13)), "source: expected a tensor (B, L), got int64 tensor of shape (3,)"),
        (
            lambda: MODEL(tokens(2, 3, high=13), tokens(1, 3, high=13)),
            "target: expected batch size 2, that of source, got int64 tensor of shape (1, 3)",
        ),
        (
            lambda: MODEL(tokens(2, 3, high=13), torch.zeros(2, 3)),
            "target: expected a int64 or int32 tensor, got float32 tensor of shape (2, 3)",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()
