"""Linformer and Nyströmformer: exact in their limits, and linear."""

from __future__ import annotations

import pytest
import torch

from attnbook import reference
from attnbook.measure import count_flops, peak_memory
from attnbook.mechanisms import linformer_attention, nystrom_attention
from attnbook.mechanisms.low_rank import iterative_pseudo_inverse, segments
from helpers import array, assert_close, complains

BOTH = pytest.mark.parametrize("function", [linformer_attention, nystrom_attention])


def inputs(L: int = 24, S: int = 24, *, size: float = 1.0):
    return tuple(size * torch.randn(2, 2, n, d, dtype=torch.float64) for n, d in ((L, 6), (S, 6), (S, 3)))


def softmax_attention(q, k, v, **options):
    return reference.attention(*map(array, (q, k, v)), **options)


def test_linformer_is_exact_where_nothing_is_mixed():
    q, k, v = inputs(20, 24)
    one = torch.eye(24, dtype=torch.float64)
    assert_close(linformer_attention(q, k, v, projection_key=one), softmax_attention(q, k, v))
    order = torch.randperm(24)
    assert_close(linformer_attention(q, k, v, projection_key=one[order]), softmax_attention(q, k, v))
    other = linformer_attention(q, k, v, projection_key=one, projection_value=one[order])
    assert_close(other, softmax_attention(q, k, v[:, :, order]))


def test_linformer_is_exact_where_keys_repeat_and_runs_are_averaged():
    q, k, v = inputs(20, 24)
    k = k[:, :, ::4].repeat_interleave(4, 2)
    runs = segments(6, 24, None, k)
    assert_close(linformer_attention(q, k, v, projection_key=runs), softmax_attention(q, k, v))


def test_linformer_draws_mixtures_that_keep_the_size_of_keys():
    q, k, v = inputs(20, 400)
    draws = [{"generator": torch.Generator().manual_seed(s), "projected_length": 16} for s in (0, 0, 1)]
    first, second, other = (linformer_attention(q, k, v, **draw) for draw in draws)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    mixture = torch.randn(16, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 20
    assert_close(first, linformer_attention(q, k, v, projection_key=mixture))
    assert (mixture @ k).std() == pytest.approx(1, rel=0.1)


def test_linformer_takes_a_mixture_for_each_head():
    q, k, v = inputs()
    mixtures = torch.randn(2, 5, 24, dtype=torch.float64) / 5
    output = linformer_attention(q, k, v, projection_key=mixtures)
    for h in range(2):
        alone = linformer_attention(*(x[:, h : h + 1] for x in (q, k, v)), projection_key=mixtures[h])
        assert_close(output[:, h : h + 1], alone)


@pytest.mark.parametrize("lengths", [(24, 24), (20, 24), (24, 20)], ids=str)
def test_nystrom_comes_to_softmax_with_every_position_a_landmark(lengths):
    q, k, v = inputs(*lengths, size=2.0)
    if lengths[0] != lengths[1]:  # fewer landmarks than positions: equal ones in runs make it exact again
        m = 4
        q, k = (x[:, :, :m].repeat_interleave(n // m, 2) for x, n in zip((q, k), lengths, strict=True))
    expected = softmax_attention(q, k, v)

    def error(steps):
        output = nystrom_attention(q, k, v, num_landmarks=24 if lengths == (24, 24) else 4, num_iterations=steps)
        return abs(array(output) - expected).max()

    assert error(6) > 1e-4 or lengths != (24, 24)  # the paper's six steps do not invert a full matrix
    assert error(40) < 1e-9
    assert error(10) < error(6)


def test_the_inverse_takes_the_steps_that_its_docstring_says():
    for condition in (1e1, 1e3, 1e5):
        u, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
        w, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
        matrix = u @ torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 8, dtype=torch.float64).diag() @ w
        norms = matrix.abs().sum(-2).max() * matrix.abs().sum(-1).max()
        growth = torch.log(norms * condition**2) / torch.log(torch.tensor(3.25))

        def gap(steps, matrix=matrix):
            return (iterative_pseudo_inverse(matrix, steps) @ matrix - torch.eye(8)).abs().max()

        assert gap(int(growth) - 2) > 0.1
        assert gap(int(growth) + 5) < 1e-4


def test_the_inverse_of_a_singular_matrix_is_the_pseudo_inverse():
    matrix = torch.rand(7, 3, dtype=torch.float64) @ torch.rand(3, 7, dtype=torch.float64)
    expected = torch.linalg.pinv(matrix, rtol=1e-10)
    assert torch.allclose(iterative_pseudo_inverse(matrix, 20), expected, rtol=1e-6, atol=1e-8)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(iterative_pseudo_inverse(zero), zero)


@pytest.mark.parametrize("smooth", [False, True], ids=["noise", "walks"])
def test_more_landmarks_err_less_but_more_steps_need_not(smooth):
    q, k, v = inputs(96, 96)
    if smooth:
        q, k = (x.cumsum(2) / 96**0.5 for x in (q, k))
    expected = softmax_attention(q, k, v)

    def error(m, steps):
        return abs(array(nystrom_attention(q, k, v, num_landmarks=m, num_iterations=steps)) - expected).mean()

    mean = abs(array(v).mean(2, keepdims=True) - expected).mean()  # of an estimate that looks at no scores at all
    assert error(48, 6) < error(16, 6) < error(4, 6) < mean
    assert error(96, 30) < 1e-6
    if smooth:
        assert error(48, 30) < error(48, 6)
    else:  # the inverse of a matrix of full rank magnifies what the landmarks miss; six steps stop short of that
        assert error(48, 30) > 2 * mean


def test_runs_are_as_equal_as_can_be():
    assert segments(3, 6, None, torch.zeros(())).tolist() == [
        [0.5, 0.5, 0, 0, 0, 0],
        [0, 0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0, 0.5, 0.5],
    ]
    sizes = (segments(7, 24, None, torch.zeros(())) > 0).sum(-1)
    assert sizes.sum() == 24
    assert sizes.max() - sizes.min() <= 1
    mask = torch.rand(5, 1, 24) < 0.7
    runs = segments(7, 24, mask, torch.zeros(()))
    for row, allowed in zip(runs, mask[:, 0], strict=True):
        assert_close(row[:, allowed], segments(7, int(allowed.sum()), None, torch.zeros(())))
        assert (row[:, ~allowed] == 0).all()


def test_masked_keys_are_absent():
    q, k, v = inputs()
    mask = torch.rand(24) < 0.7
    options = {"num_landmarks": 6, "num_iterations": 6}
    output = nystrom_attention(q, k, v, attn_mask=mask[None, None, None], **options)
    assert_close(output, nystrom_attention(q, k[:, :, mask], v[:, :, mask], **options), times=10)
    mixture = torch.randn(5, 24, dtype=torch.float64)
    output = linformer_attention(q, k, v, projection_key=mixture, attn_mask=mask[None, None, None])
    assert_close(output, linformer_attention(q, k[:, :, mask], v[:, :, mask], projection_key=mixture[:, mask]))


def test_nystrom_equals_hugging_faces_layer():
    transformers = pytest.importorskip("transformers")
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = transformers.NystromformerConfig(
        hidden_size=6,
        num_attention_heads=1,  # of several it takes the largest norm to scale the first inverse
        num_landmarks=4,
        segment_means_seq_len=24,
        attention_probs_dropout_prob=0.0,
    )
    layer = NystromformerSelfAttention(config)
    layer.conv_kernel_size = None
    hidden = torch.randn(1, 24, 6)
    q, k, v = (f(hidden)[:, None] for f in (layer.query, layer.key, layer.value))
    assert_close(nystrom_attention(q, k, v, num_landmarks=4), layer(hidden)[0][:, None].double(), times=4)


@BOTH
def test_work_and_memory_grow_linearly(function):
    def call(n):
        x = torch.ones(1, 1, n, 8)
        mixture = {"projection_key": torch.ones(16, n)} if function is linformer_attention else {"num_landmarks": 16}
        return lambda: function(x, x, x, **mixture)

    first, second, third = (count_flops(call(n)) for n in (256, 512, 768))
    assert third - second == second - first > 0  # linear, but for the inverse, which does not grow
    assert peak_memory(call(2048)) < 4.5 * peak_memory(call(512))


GOOD = torch.zeros(2, 4, 3, 8)
CAUSAL = "is_causal: expected False: this mechanism has no causal form (these have: …linear_attention…), got True"


@BOTH
def test_causal_calls_are_refused(function):
    with complains(CAUSAL):
        function(GOOD, GOOD, GOOD, is_causal=True)
    with complains("attn_mask: expected a mask of keys, …"):
        function(GOOD, GOOD, GOOD, attn_mask=torch.ones(3, 3, dtype=torch.bool))


def test_bad_arguments_are_named():
    with complains("num_landmarks: expected an integer ≥ 1, got 0"):
        nystrom_attention(GOOD, GOOD, GOOD, num_landmarks=0)
    with complains("num_iterations: expected an integer ≥ 1, got 0"):
        nystrom_attention(GOOD, GOOD, GOOD, num_iterations=0)
    with complains("projected_length: expected an integer ≥ 1, got 0"):
        linformer_attention(GOOD, GOOD, GOOD, projected_length=0)
    with complains("projection_key: expected (k, S) or (H, k, S) with H = 4, S = 3, got shape (5, 4)"):
        linformer_attention(GOOD, GOOD, GOOD, projection_key=torch.ones(5, 4))
    with complains("projection_value: expected k = 5 rows, as many as projection_key has, got shape (4, 3)"):
        linformer_attention(GOOD, GOOD, GOOD, projection_key=torch.ones(5, 3), projection_value=torch.ones(4, 3))
