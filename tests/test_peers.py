"""Independent checks: our attention and positions against published implementations with equal weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import attnbook
from attnbook import masks, positions
from attnbook.layers import MultiHeadAttention
from helpers import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the packages warn of while they are imported is theirs
    transformers = pytest.importorskip("transformers")
    x_transformers = pytest.importorskip("x_transformers.x_transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.gptj.modeling_gptj import GPTJAttention
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
    from transformers.models.t5.modeling_t5 import T5Attention

E, H, L = 48, 6, 23


def additive(mask: Tensor) -> Tensor:
    """Turn our mask into the one that Hugging Face's eager attention adds."""
    return masks.to_bias(mask, torch.float64)[None, None]


def same_weights(ours: MultiHeadAttention, theirs: nn.Module, *names: str) -> MultiHeadAttention:
    for mine, other in zip(("q_proj", "k_proj", "v_proj", "out_proj"), names, strict=True):
        getattr(ours, mine).load_state_dict(getattr(theirs, other).state_dict())
    return ours


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_llama_groups_its_heads_and_turns_halves(kv_heads, base):
    config = transformers.LlamaConfig(
        hidden_size=E,
        num_attention_heads=H,
        num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, 0).double()
    rotary = positions.RotaryEmbedding(E // H, base=base)
    ours = MultiHeadAttention(E, H, num_kv_heads=kv_heads, bias=False, rotary=rotary).double()
    same_weights(ours, theirs, "q_proj", "k_proj", "v_proj", "o_proj")
    x = torch.randn(2, L, E, dtype=torch.float64)
    places = torch.arange(L)
    tables = LlamaRotaryEmbedding(config)(x.float(), places[None])  # float32, as they are in the model
    expected, weights = theirs(
        x, position_embeddings=tuple(t.double() for t in tables), attention_mask=additive(masks.causal(L))
    )
    output, ours_weights = ours(x, is_causal=True, need_weights=True)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(ours_weights, weights, atol=2e-6, rtol=0)


def test_gptj_turns_neighbours():
    config = transformers.GPTJConfig(n_embd=E, n_head=H, rotary_dim=E // H, n_positions=64)
    theirs = GPTJAttention(config, 0).eval()
    rotary = positions.RotaryEmbedding(E // H, pairing="interleaved")
    ours = same_weights(
        MultiHeadAttention(E, H, bias=False, rotary=rotary), theirs, "q_proj", "k_proj", "v_proj", "out_proj"
    )
    x = torch.randn(2, L, E)
    expected = theirs(x, position_ids=torch.arange(L)[None], attention_mask=additive(masks.causal(L)).float())[0]
    torch.testing.assert_close(ours(x, is_causal=True), expected, atol=2e-6, rtol=0)
    wrong = same_weights(
        MultiHeadAttention(E, H, bias=False, rotary=positions.RotaryEmbedding(E // H)),
        theirs,
        *("q_proj", "k_proj", "v_proj", "out_proj"),
    )
    assert (wrong(x, is_causal=True) - expected).abs().max() > 1e-3  # the other pairing is another function


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 20])
def test_bloom_has_the_same_alibi(heads):
    theirs = build_alibi_tensor(torch.ones(1, L, dtype=torch.long), heads, torch.float32)[
        :, 0
    ]  # slope · key's position
    weights = torch.softmax(theirs[:, None, :].expand(heads, L, L) + masks.to_bias(masks.causal(L)), -1)
    ours = torch.softmax(positions.alibi_bias(heads, L) + masks.to_bias(masks.causal(L)), -1)
    torch.testing.assert_close(ours, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [2, 6, 8])
@pytest.mark.parametrize("lengths", [(9, 9), (4, 9)])
def test_x_transformers_has_the_same_alibi(heads, lengths):
    torch.testing.assert_close(
        positions.alibi_bias(heads, *lengths), x_transformers.AlibiPositionalBias(heads)(*lengths)
    )


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("buckets", [(32, 128), (8, 20)])
def test_t5_has_the_same_bias_and_the_same_output(decoder, buckets):
    config = transformers.T5Config(
        d_model=E,
        num_heads=H,
        d_kv=E // H,
        dropout_rate=0.0,
        is_decoder=decoder,
        relative_attention_num_buckets=buckets[0],
        relative_attention_max_distance=buckets[1],
        attn_implementation="eager",
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0, is_causal=decoder).eval()
    ours = positions.T5RelativeBias(H, num_buckets=buckets[0], max_distance=buckets[1], bidirectional=not decoder)
    with torch.no_grad():
        ours.table.copy_(theirs.relative_attention_bias.weight)
        for length in (L, 300):
            assert torch.equal(ours(length), theirs.compute_bias(length, length)[0])
        x = torch.randn(2, L, E)
        causal = additive(masks.causal(L)).float() if decoder else None
        expected = theirs(x, mask=causal)[0]
        q, k, v = (project(x).unflatten(-1, (H, -1)).transpose(1, 2) for project in (theirs.q, theirs.k, theirs.v))
        mixed = attnbook.attention(q, k, v, bias=ours(L), is_causal=decoder, scale=1.0)  # T5 does not scale
        torch.testing.assert_close(theirs.o(mixed.transpose(1, 2).flatten(2)), expected, atol=2e-5, rtol=1e-5)


def test_x_transformers_turns_neighbours():
    x = torch.randn(2, H, L, 8)
    rotary = x_transformers.RotaryEmbedding(8)
    frequencies, _ = rotary.forward_from_seq_len(L)
    ours = positions.RotaryEmbedding(8, pairing="interleaved")(x, torch.arange(L))
    torch.testing.assert_close(ours, x_transformers.apply_rotary_pos_emb(x, frequencies), atol=2e-6, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_x_transformers_attends_alike(causal, kv_heads):
    theirs = x_transformers.Attention(E, dim_head=8, heads=H, kv_heads=kv_heads, causal=causal).eval()
    ours = MultiHeadAttention(E, H, num_kv_heads=kv_heads, bias=False)
    x = torch.randn(2, L, E)
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    # They share heads as (group, key–value head), we as (key–value head, group): h = g · Hkv + i there, i · G + g here.
    order = torch.arange(H).view(-1, kv_heads).T.flatten()
    rows = (order[:, None] * 8 + torch.arange(8)).flatten()
    with torch.no_grad():
        ours.q_proj.weight.copy_(theirs.to_q.weight[rows])
        ours.k_proj.weight.copy_(theirs.to_k.weight)
        ours.v_proj.weight.copy_(theirs.to_v.weight)
        ours.out_proj.weight.copy_(theirs.to_out.weight[:, rows])
    torch.testing.assert_close(ours(x, is_causal=causal), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_pytorch_attends_alike_with_padding_and_gives_equal_gradients(causal):
    theirs = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours = MultiHeadAttention.from_torch(theirs)
    lengths = torch.tensor([L, 5])
    inputs = [torch.randn(2, L, E, dtype=torch.float64) for _ in range(3)]
    pairs = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    hidden = ~masks.padding(lengths, L)[:, 0, 0]
    expected, _ = theirs(*pairs[0], key_padding_mask=hidden, attn_mask=~masks.causal(L) if causal else None)
    output = ours(*pairs[1], attn_mask=masks.padding(lengths, L), is_causal=causal)
    assert_close(output, expected)
    weight = torch.randn_like(output)
    for mine, other in zip(
        torch.autograd.grad(output, pairs[1], weight), torch.autograd.grad(expected, pairs[0], weight), strict=True
    ):
        assert_close(mine, other, gradient=True)
