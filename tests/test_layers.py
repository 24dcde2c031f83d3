"""Layers against PyTorch's own and against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnbook
from attnbook import layers, masks
from attnbook.cache import StaticCache
from attnbook.layers import CrossBlock, FeedForward, MultiHeadAttention, TransformerBlock
from attnbook.positions import RotaryEmbedding
from helpers import complains

E, H = 12, 3


def randomised(module: nn.Module) -> nn.Module:
    """Give every parameter, biases too, a random value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (7, 5), (None, 5), (7, None)])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_torch_gives_equal_outputs_and_weights(bias, kdim, vdim, batch_first, dtype):
    theirs = nn.MultiheadAttention(E, H, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first, dtype=dtype)
    randomised(theirs)
    ours = MultiHeadAttention.from_torch(theirs)
    query = torch.randn(2, 4, E, dtype=dtype)
    key, value = torch.randn(2, 6, kdim or E, dtype=dtype), torch.randn(2, 6, vdim or E, dtype=dtype)
    allowed, real = torch.rand(4, 6) < 0.7, torch.tensor([6, 4])
    allowed[:, 0] = True  # PyTorch gives NaN where nothing is left
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    expected, weights = theirs(
        turn(query),
        turn(key),
        turn(value),
        attn_mask=~allowed,  # PyTorch's True means: may not attend
        key_padding_mask=~masks.padding(real, 6)[:, 0, 0],
        average_attn_weights=False,
    )
    mask = allowed & masks.padding(real, 6)
    output, found = ours(query, key, value, attn_mask=mask, need_weights=True)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert torch.allclose(output, turn(expected), rtol=0, atol=tolerance)
    assert torch.allclose(found, weights, rtol=0, atol=tolerance)
    assert torch.allclose(ours(query, key, value, attn_mask=mask), output, rtol=0, atol=tolerance)


def test_from_torch_copies_gradients_dropout_mode_and_nothing_shared():
    theirs = randomised(nn.MultiheadAttention(E, H, dropout=0.3, batch_first=True)).eval()
    ours = MultiHeadAttention.from_torch(theirs)
    assert ours.dropout == 0.3
    assert not ours.training
    assert MultiHeadAttention.from_torch(theirs.train()).training
    x = torch.randn(2, 5, E)
    ours.eval()(x, is_causal=True).square().sum().backward()
    theirs.eval()(x, x, x, attn_mask=~masks.causal(5), need_weights=False)[0].square().sum().backward()
    q, k, v = theirs.in_proj_weight.grad.chunk(3)
    for linear, gradient in (
        (ours.q_proj, q),
        (ours.k_proj, k),
        (ours.v_proj, v),
        (ours.out_proj, theirs.out_proj.weight.grad),
    ):
        assert torch.allclose(linear.weight.grad, gradient, rtol=1e-4, atol=1e-4)
    nn.init.zeros_(theirs.out_proj.weight)
    assert (ours.out_proj.weight != 0).all()


def test_all_four_projections_have_biases_or_none():
    with_bias, without = MultiHeadAttention(E, H), MultiHeadAttention(E, H, bias=False)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert getattr(with_bias, name).bias is not None
        assert getattr(without, name).bias is None
    x = torch.randn(1, 4, E)
    before = with_bias(x)
    with torch.no_grad():
        with_bias.v_proj.bias.add_(1)
    shift = with_bias(x) - before  # weights sum to 1: the values' bias passes through as it is
    assert torch.allclose(shift, with_bias.out_proj.weight.sum(1).expand_as(shift), atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_repeated_ones(kv_heads):
    grouped = MultiHeadAttention(16, 4, num_kv_heads=kv_heads)
    full = MultiHeadAttention(16, 4)
    with torch.no_grad():
        for name in ("q_proj", "out_proj"):
            getattr(full, name).load_state_dict(getattr(grouped, name).state_dict())
        for name in ("k_proj", "v_proj"):
            narrow, wide = getattr(grouped, name), getattr(full, name)
            wide.weight.copy_(narrow.weight.view(kv_heads, 4, 16).repeat_interleave(4 // kv_heads, 0).flatten(0, 1))
            wide.bias.copy_(narrow.bias.view(kv_heads, 4).repeat_interleave(4 // kv_heads, 0).flatten())
    x = torch.randn(2, 5, 16)
    assert torch.allclose(grouped(x, is_causal=True), full(x, is_causal=True), atol=1e-6)
    assert grouped.k_proj.weight.shape == (kv_heads * 4, 16)


def test_head_size_is_free_of_the_width():
    layer = MultiHeadAttention(10, 3, head_dim=7)
    output, weights = layer(torch.randn(2, 4, 10), need_weights=True)
    assert output.shape == (2, 4, 10)
    assert weights.shape == (2, 3, 4, 4)
    assert layer.q_proj.weight.shape == (21, 10)


def test_keys_default_to_queries_and_values_to_keys():
    layer = MultiHeadAttention(E, H)
    x, y = torch.randn(2, 4, E), torch.randn(2, 6, E)
    assert torch.equal(layer(x), layer(x, x, x))
    assert torch.equal(layer(x, y), layer(x, y, y))
    assert MultiHeadAttention(E, H, key_dim=5).v_proj.in_features == 5


def test_normalizer_and_backend_are_passed_on():
    layer = MultiHeadAttention(E, H, normalizer="sparsemax")
    _, weights = layer(5 * torch.randn(2, 8, E), need_weights=True)
    assert (weights == 0).any()
    layer = MultiHeadAttention(E, H, backend="tiled")
    with complains("backend: expected 'reference' or 'auto' with return_weights=True, got 'tiled'"):
        layer(torch.randn(2, 4, E), need_weights=True)


def test_dropout_acts_in_training_only():
    layer, x = MultiHeadAttention(E, H, dropout=0.5), torch.randn(2, 6, E)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_rows_with_nothing_to_attend_to_give_the_output_bias():
    layer = randomised(MultiHeadAttention(E, H))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    output = layer(torch.randn(2, 4, E), attn_mask=mask)
    assert torch.equal(output[:, 2], layer.out_proj.bias.expand(2, E))


@pytest.mark.parametrize("rotary", [None, "halves", "interleaved"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "tiled"])
def test_decoding_step_by_step_equals_the_full_pass(rotary, kv_heads, chunk, backend):
    turn = None if rotary is None else RotaryEmbedding(4, pairing=rotary)
    layer = MultiHeadAttention(16, 4, num_kv_heads=kv_heads, rotary=turn, backend=backend)
    x = torch.randn(2, 9, 16)
    cache = StaticCache(2, kv_heads, 9, 4)
    with torch.no_grad():
        steps = [layer(x[:, i : i + chunk], is_causal=True, cache=cache) for i in range(0, 9, chunk)]
        assert torch.allclose(torch.cat(steps, 1), layer(x, is_causal=True), atol=1e-6)
    with complains("key: expected at most 0 more positions, got 1"), torch.no_grad():
        layer(x[:, :1], cache=cache)


def test_rotary_attention_does_not_change_when_all_positions_shift():
    layer = MultiHeadAttention(16, 4, rotary=RotaryEmbedding(4))
    x = torch.randn(1, 5, 16)
    cache = StaticCache(1, 4, 40, 4)
    with torch.no_grad():
        first = layer(x, is_causal=True)
        layer(torch.randn(1, 30, 16), cache=cache)
        mask = torch.cat([torch.zeros(5, 30, dtype=torch.bool), masks.causal(5)], 1)
        assert torch.allclose(layer(x, attn_mask=mask, cache=cache), first, atol=1e-5)


@pytest.mark.parametrize("activation", layers.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward(activation, bias):
    layer = FeedForward(6, 10, activation=activation, bias=bias)
    x = torch.randn(2, 3, 6)
    up = x @ layer.up.weight.T + (layer.up.bias if bias else 0)
    if activation == "relu":
        hidden = up.clamp(min=0)
    elif activation == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / 2**0.5))
    else:
        gate = x @ layer.gate.weight.T + (layer.gate.bias if bias else 0)
        bent = (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2
        hidden = gate * (torch.sigmoid(gate) if activation == "swiglu" else bent) * up
    expected = hidden @ layer.down.weight.T + (layer.down.bias if bias else 0)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert len(list(layer.parameters())) == (3 if activation in layers.GATED else 2) * (2 if bias else 1)


def test_feed_forward_is_four_times_as_wide_inside_unless_told():
    assert FeedForward(6).up.out_features == 24
    assert FeedForward(6, 9).up.out_features == 9


def test_feed_forward_drops_hidden_units_in_training_only():
    layer, x = FeedForward(6, dropout=0.5), torch.randn(2, 3, 6)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_norms_against_their_formulas():
    x = torch.randn(4, 6)
    layer, rms = layers.NORMS["layer"](6), layers.NORMS["rms"](6)
    randomised(layer), randomised(rms)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(rms(x), x / x.square().mean(-1, keepdim=True).sqrt() * rms.weight, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("cross", [False, True])
def test_pre_norm_leaves_the_stream_alone_and_post_norm_normalises_it(norm, cross):
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 7, 8) if cross else None
    for norm_first in (True, False):
        block = TransformerBlock(8, 2, norm=norm, norm_first=norm_first, cross_attention=cross)
        parts = [(block.attention_norm, lambda y, b=block: b.attention(y, is_causal=True))]
        if cross:
            parts.append((block.cross_norm, lambda y, b=block: b.cross(y, memory)))
        parts.append((block.feed_forward_norm, block.feed_forward))
        expected = x
        for normalise, part in parts:
            expected = expected + part(normalise(expected)) if norm_first else normalise(expected + part(expected))
        assert torch.allclose(block(x, memory=memory, is_causal=True), expected, atol=1e-6)


def test_block_equals_pytorch_encoder_layer():
    for norm_first in (True, False):
        theirs = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", norm_first=norm_first, batch_first=True)
        ours = TransformerBlock(8, 2, hidden=16, norm_first=norm_first)
        ours.attention.load_state_dict(MultiHeadAttention.from_torch(theirs.self_attn).state_dict())
        ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
        ours.feed_forward.down.load_state_dict(theirs.linear2.state_dict())
        x = torch.randn(2, 5, 8)
        real = torch.tensor([5, 3])
        expected = theirs(x, src_key_padding_mask=~masks.padding(real)[:, 0, 0])
        assert torch.allclose(ours(x, attn_mask=masks.padding(real)), expected, atol=1e-5)


def test_block_masks_and_options_reach_the_attention():
    block = TransformerBlock(8, 2, cross_attention=True, num_kv_heads=1, normalizer="sigmoid").eval()
    assert block.attention.num_kv_heads == 1
    assert block.attention.normalizer == "sigmoid"
    x, memory = torch.randn(1, 4, 8), torch.randn(1, 6, 8)
    mask = torch.tensor([True, True, False, False, False, False])
    changed = memory.clone()
    changed[:, 2:] += 1
    assert torch.equal(block(x, memory=memory, memory_mask=mask), block(x, memory=changed, memory_mask=mask))
    assert not torch.equal(block(x, memory=memory), block(x, memory=changed))


def test_scale_and_score_bias_reach_the_scores():
    layer, x, bias = MultiHeadAttention(8, 2, scale=1.0), torch.randn(2, 5, 8), torch.randn(2, 5, 5)
    q, k = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    expected = (q @ k.transpose(-2, -1) + bias).softmax(-1)
    output, weights = layer(x, score_bias=bias, need_weights=True)
    assert torch.allclose(weights, expected, atol=1e-6)
    assert torch.allclose(layer(x, score_bias=bias), output, atol=1e-6)
    block = TransformerBlock(8, 2, cross_attention=True, scale=0.5, cross_options={"scale": 1.0, "key_dim": 3})
    assert (block.attention.scale, block.cross.scale) == (0.5, 1.0)
    memory = torch.randn(2, 7, 3)
    _, weights, _ = block(x, memory=memory, score_bias=bias, need_weights=True)
    _, plain = block.attention(block.attention_norm(x), score_bias=bias, need_weights=True)
    assert torch.equal(weights, plain)


@pytest.mark.parametrize("gated", [False, True])
def test_a_cross_block_reads_the_memory_through_two_gates(gated):
    block = CrossBlock(8, 2, memory_width=6, gated=gated)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 7, 6)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None, None, None]
    if gated:
        assert torch.equal(block(x, memory), x)
        nn.init.normal_(block.gates)
    first, second = block.gates.tanh() if gated else (1, 1)
    y = x + first * block.attention(block.attention_norm(x), block.memory_norm(memory), attn_mask=mask)
    y = y + second * block.feed_forward(block.feed_forward_norm(y))
    output, weights = block(x, memory, memory_mask=mask, need_weights=True)
    assert torch.allclose(output, y, atol=1e-6)
    assert weights.shape == (2, 2, 5, 7)
    assert (weights[1, :, :, 4:] == 0).all()
    assert torch.allclose(block(x, memory, memory_mask=mask), output, atol=1e-6)


def test_caches_fit_the_blocks():
    blocks = [TransformerBlock(8, 4, num_kv_heads=2) for _ in range(3)]
    caches = layers.make_caches(blocks, 5, 7, torch.zeros(1, dtype=torch.float64))
    assert [cache.keys.shape for cache in caches] == [(5, 2, 7, 2)] * 3
    assert caches[0].values.dtype == torch.float64


def test_block_dropout_acts_on_what_is_added():
    block, x = TransformerBlock(8, 2, dropout=0.9), torch.randn(1, 50, 8)
    untouched = (block(x) == x).float().mean().item()
    assert 0.7 < untouched < 0.95  # 0.9² of the components get nothing from either part


M = MultiHeadAttention(E, H)
X = torch.zeros(2, 4, E)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: MultiHeadAttention(0, 1), "embed_dim: expected an integer ≥ 1, got 0"),
        (lambda: MultiHeadAttention(8, 0), "num_heads: expected an integer ≥ 1, got 0"),
        (lambda: MultiHeadAttention(8, 3), "num_heads: expected a divisor of embed_dim = 8, got 3"),
        (lambda: MultiHeadAttention(8, 4, num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        (lambda: MultiHeadAttention(8, 4, num_kv_heads=0), "num_kv_heads: expected an integer ≥ 1, got 0"),
        (lambda: MultiHeadAttention(8, 4, head_dim=0), "head_dim: expected an integer ≥ 1, got 0"),
        (lambda: MultiHeadAttention(8, 4, key_dim=0), "key_dim: expected an integer ≥ 1, got 0"),
        (lambda: MultiHeadAttention(8, 4, value_dim=-1), "value_dim: expected an integer ≥ 1, got -1"),
        (lambda: MultiHeadAttention(8, 4, dropout=1.0), "dropout: expected a number in [0, 1), got 1.0"),
        (lambda: MultiHeadAttention(E, H, backend="nope")(X), "backend: expected one of …, got 'nope'"),
        (lambda: MultiHeadAttention(E, H, normalizer="nope")(X), "normalizer: expected one of …, got 'nope'"),
        (lambda: M(X[0]), "query: expected a tensor (B, L, E), got float32 tensor of shape (4, 12)"),
        (lambda: M(X[..., :5]), "query: expected last axis 12, got shape (2, 4, 5)"),
        (lambda: M(X, X[..., :5]), "key: expected last axis 12, got shape (2, 4, 5)"),
        (lambda: M(X, X, X[:, :3]), "value: expected (Hkv, S) = (3, 4), those of key, got shape (2, 3, 3, 4)"),
        (lambda: M(X, X[:1]), "key: expected batch size 2, that of query, got float32 tensor of shape (1, 3, 4, 4)"),
        (
            lambda: M(X[:, :0]),
            "query: expected a tensor (B, L, E) with no empty axis, got float32 tensor of shape (2, 0, 12)",
        ),
        (
            lambda: M(X, attn_mask=torch.ones(4, 4)),
            "attn_mask: expected a bool tensor (True = may attend), got float32 tensor of shape (4, 4)",
        ),
        (
            lambda: M(X, attn_mask=torch.ones(2, 4, dtype=torch.bool)),
            "attn_mask: expected broadcastable to (B, H, L, S) = (2, 3, 4, 4), got bool tensor of shape (2, 4)",
        ),
        (
            lambda: MultiHeadAttention(E, H, rotary=RotaryEmbedding(4))(X, X),
            "key: expected None: rotary positions are for self-attention, got float32 tensor of shape (2, 4, 12)",
        ),
        (
            lambda: MultiHeadAttention(E, H, rotary=RotaryEmbedding(6))(X),
            "x: expected last axis D = 6, got shape (2, 3, 4, 4)",
        ),
        (lambda: MultiHeadAttention.from_torch(M), "module: expected an nn.MultiheadAttention, got MultiHeadAttention"),
        (
            lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(4, 2, add_bias_kv=True)),
            "module: expected add_bias_kv=False and add_zero_attn=False, got one of them on",
        ),
        (
            lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(4, 2, add_zero_attn=True)),
            "module: expected add_bias_kv=False and add_zero_attn=False, got one of them on",
        ),
        (lambda: FeedForward(0), "width: expected an integer ≥ 1, got 0"),
        (lambda: FeedForward(4, 0), "hidden: expected an integer ≥ 1, got 0"),
        (
            lambda: CrossBlock(4, 2, memory_width=6)(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)),
            "memory: expected last axis 6, got shape (1, 2, 4)",
        ),
        (lambda: CrossBlock(4, 2)(torch.zeros(1, 2, 6), torch.zeros(1, 2, 4)), "x: expected last axis 4, got …"),
        (lambda: FeedForward(4, activation="tanh"), "activation: expected one of 'relu', 'gelu', …, got 'tanh'"),
        (lambda: FeedForward(4, dropout=2), "dropout: expected a number in [0, 1), got 2"),
        (lambda: TransformerBlock(8, 2, norm="batch"), "norm: expected one of 'layer', 'rms', got 'batch'"),
        (lambda: TransformerBlock(8, 2, dropout=-1), "dropout: expected a number in [0, 1), got -1"),
        (lambda: TransformerBlock(E, H)(X, memory=X), "memory: expected None, got float32 tensor of shape (2, 4, 12)"),
        (
            lambda: TransformerBlock(E, H, cross_attention=True)(X),
            "memory: expected a tensor (B, S, E), got None",
        ),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call()


def test_the_module_is_reached_through_the_package():
    assert attnbook.layers is layers
