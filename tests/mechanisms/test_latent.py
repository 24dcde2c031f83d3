"""Latent attention: two forms that are equal, and the published layers with the same weights."""

from __future__ import annotations

import pytest
import torch

import attnbook
from attnbook import masks, measure
from attnbook.mechanisms import latent_attention
from attnbook.mechanisms.latent import LatentAttention
from helpers import DTYPES, array, assert_close, complains, name_of

H, D, DV, C, R = 4, 6, 5, 7, 2


def inputs(L: int, S: int, *, rope: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    sizes = {"query": (2, H, L, D), "latent": (2, S, C), "key_up": (H, D, C), "value_up": (H, DV, C)}
    if rope:
        sizes |= {"query_rope": (2, H, L, R), "key_rope": (2, S, R)}
    return {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(9, 9), (1, 13), (5, 13), (13, 5)], ids=name_of)
def test_both_forms_equal_the_specification_forward_and_backward(lengths, is_causal, rope):
    given = inputs(*lengths, rope=rope)
    mask = torch.rand(2, 1, *lengths) < 0.7
    mask[1, :, ::3] = False  # empty rows
    options = {"attn_mask": mask, "is_causal": is_causal, "scale": None}
    expected = attnbook.reference.latent_attention(**{n: array(x) for n, x in given.items()}, **options)
    found = {form: latent_attention(**given, **options, form=form) for form in ("expanded", "absorbed")}
    weight = torch.randn(expected.shape, dtype=torch.float64)
    gradients = {f: torch.autograd.grad(y, list(given.values()), weight) for f, y in found.items()}
    for output in found.values():
        assert_close(output, expected, times=4)
        assert not output[1, :, ::3].any()
    for one, other in zip(gradients["expanded"], gradients["absorbed"], strict=True):
        assert_close(one, other, gradient=True, times=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_absorbed_form_in_every_type(dtype):
    given = inputs(1, 40, dtype=dtype)
    expected = attnbook.reference.latent_attention(**{n: array(x) for n, x in given.items()})
    found = latent_attention(**given, form="absorbed")
    assert found.dtype == dtype
    # Two more products than the expanded form; in half precision they are float32's, and only the end is rounded.
    assert_close(found, expected, times=2 if dtype in (torch.float64, torch.float32) else 1)


def test_identity_matrices_give_attention_to_the_latents():
    q, c = torch.randn(2, H, 5, C, dtype=torch.float64), torch.randn(2, 9, C, dtype=torch.float64)
    eye = torch.eye(C, dtype=torch.float64).expand(H, C, C)
    shared = c[:, None]  # one key–value head: multi-query attention
    for form in ("expanded", "absorbed"):
        assert_close(latent_attention(q, c, eye, eye, form=form), attnbook.attention(q, shared, shared))


def test_no_output_sends_a_gradient_to_the_future():
    for form in ("expanded", "absorbed"):
        given = inputs(9, 9)
        output = latent_attention(**given, is_causal=True, form=form)
        names = ("latent", "key_rope")
        for i in (0, 4, 7):
            found = torch.autograd.grad(output[:, :, i].sum(), [given[n] for n in names], retain_graph=True)
            for gradient in found:
                assert not gradient[:, i + 1 :].any()
            assert found[0][:, i].any()


def test_absorbed_decoding_never_makes_the_keys_of_all_heads():
    S, heads, width = 2048, 16, 32

    def call(form: str):
        q, c = torch.zeros(1, heads, 1, width), torch.zeros(1, S, width)
        up = torch.zeros(heads, width, width)
        return lambda: latent_attention(q, c, up, up, form=form)

    keys = heads * S * width * 4
    assert measure.peak_memory(call("expanded")) > 2 * keys
    assert measure.peak_memory(call("absorbed")) < keys / 4
    assert measure.count_flops(call("absorbed")) < measure.count_flops(call("expanded")) / 8


def test_gradcheck():
    given = inputs(2, 3)
    for form in ("expanded", "absorbed"):

        def call(q, c, k, v, qr, kr, form=form):
            return latent_attention(q, c, k, v, query_rope=qr, key_rope=kr, is_causal=True, form=form)

        assert torch.autograd.gradcheck(call, tuple(given.values()), fast_mode=True)


@pytest.mark.parametrize("query_latent_dim", [None, 6])
def test_the_layer_decodes_from_its_cache_as_it_trains(query_latent_dim):
    layer = LatentAttention(
        12, H, latent_dim=C, head_dim=D, rope_dim=R, value_dim=DV, query_latent_dim=query_latent_dim
    ).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    at_once = layer(x)
    past = None
    for i in range(7):
        step = layer(x[:, i : i + 1], past=past, form="absorbed")
        assert_close(step, at_once[:, i : i + 1], times=20)
        new = layer.compress(x[:, i : i + 1], torch.tensor([i]))
        past = new if past is None else tuple(torch.cat(pair, 1) for pair in zip(past, new, strict=True))
    assert sum(part.shape[-1] for part in past) == C + R
    assert_close(layer(x, attn_mask=masks.causal(7), is_causal=False), at_once)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("q_lora_rank", [None, 6])
def test_the_layer_equals_hugging_faces(version, q_lora_rank):
    transformers = pytest.importorskip("transformers")
    if version == "v2":
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs

        make, kind = transformers.DeepseekV2Config, "DeepseekV2"
    else:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

        make, kind = transformers.DeepseekV3Config, "DeepseekV3"
    config = make(
        hidden_size=12,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=C,
        qk_nope_head_dim=D,
        qk_rope_head_dim=R * 2,
        v_head_dim=DV,
        attn_implementation="eager",
    )
    layer = getattr(theirs, f"{kind}Attention")(config, 0).double().eval()
    ours = LatentAttention(
        12,
        H,
        latent_dim=C,
        head_dim=D,
        rope_dim=R * 2,
        value_dim=DV,
        query_latent_dim=q_lora_rank,
        eps=layer.kv_a_layernorm.variance_epsilon,
    ).double()
    pairs = {
        "down": layer.kv_a_proj_with_mqa,
        "norm": layer.kv_a_layernorm,
        "up": layer.kv_b_proj,
        "output": layer.o_proj,
    }
    if q_lora_rank is None:
        pairs["query"] = layer.q_proj
    else:
        pairs |= {"query.0": layer.q_a_proj, "query.1": layer.q_a_layernorm, "query.2": layer.q_b_proj}
    ours.load_state_dict({f"{name}.weight": module.weight for name, module in pairs.items()})
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    angles = torch.arange(9)[:, None] * 10000.0 ** (-torch.arange(0, 2 * R, 2, dtype=torch.float64) / (2 * R))
    if version == "v2":
        places = torch.polar(torch.ones_like(angles), angles)[None]
    else:
        doubled = torch.cat([angles, angles], -1)[None]
        places = (doubled.cos(), doubled.sin())
    hidden = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~masks.causal(9), -torch.inf)[None, None]
    expected = layer(hidden_states=x, position_embeddings=places, attention_mask=hidden)[0]
    # Their norms, and in V2 their rotation, are computed in float32 whatever the model's type.
    for form in ("expanded", "absorbed"):
        assert torch.allclose(ours(x, form=form), expected, rtol=0, atol=2e-6)
    assert expected.abs().max() > 1e-2


GOOD = {
    "query": torch.zeros(2, H, 3, D),
    "latent": torch.zeros(2, 8, C),
    "key_up": torch.zeros(H, D, C),
    "value_up": torch.zeros(H, DV, C),
    "query_rope": torch.zeros(2, H, 3, R),
    "key_rope": torch.zeros(2, 8, R),
}
BAD = {
    "latent: expected a tensor (B, S, C), got float32 tensor of shape (2, 1, 8, 7)": {
        "latent": GOOD["latent"][:, None]
    },
    "latent: expected (B, S, C) = (2, 8, 7), got shape (1, 8, 7)": {"latent": GOOD["latent"][:1]},
    "latent: expected float32, the type of query, got float64": {"latent": GOOD["latent"].double()},
    "latent: expected no NaN, got 112 NaN of 112 elements": {"latent": GOOD["latent"] * float("nan")},
    "key_up: expected (H, D, C) = (4, 6, 7), got shape (4, 5, 7)": {"key_up": GOOD["value_up"]},
    "value_up: expected (H, Dv, C) = (4, 5, 7), got shape (4, 5, 6)": {"value_up": GOOD["value_up"][..., :6]},
    "query_rope, key_rope: expected both or neither, got one of them": {"key_rope": None},
    "key_rope: expected (B, S, R) = (2, 8, 2), got shape (2, 3, 2)": {"key_rope": GOOD["key_rope"][:, :3]},
    "form: expected one of 'expanded', 'absorbed', got 'naive'": {"form": "naive"},
    "attn_mask: expected a bool tensor (True = may attend), got float32 tensor of shape (3, 8)": {
        "attn_mask": torch.zeros(3, 8)
    },
}


@pytest.mark.parametrize(("text", "arguments"), BAD.items(), ids=range(len(BAD)))
def test_bad_arguments_are_named(text, arguments):
    with complains(text):
        latent_attention(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("rope_dim: expected an even integer, got 3", {"rope_dim": 3}),
        ("latent_dim: expected an integer ≥ 1, got 0", {"latent_dim": 0}),
        ("query_latent_dim: expected an integer ≥ 1, got 0", {"query_latent_dim": 0}),
    ],
)
def test_the_layer_names_bad_arguments(text, arguments):
    with complains(text):
        LatentAttention(**{"embed_dim": 8, "num_heads": 2, "latent_dim": 4, "head_dim": 4, "rope_dim": 2, **arguments})
