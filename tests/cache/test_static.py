"""Caches: what was appended is what comes back."""

from __future__ import annotations

import pytest
import torch

from attnbook.cache import StaticCache
from helpers import complains


def test_update_returns_all_positions_so_far():
    cache = StaticCache(2, 3, 8, 4, value_dim=5)
    key, value = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 5)
    for start, end in ((0, 3), (3, 4), (4, 7)):
        keys, values = cache.update(key[:, :, start:end], value[:, :, start:end])
        assert torch.equal(keys, key[:, :, :end])
        assert torch.equal(values, value[:, :, :end])
        assert cache.length == end
    assert keys.data_ptr() == cache.keys.data_ptr()  # a view, not a copy


def test_reset_forgets():
    cache = StaticCache(1, 1, 4, 2)
    cache.update(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2))
    cache.reset()
    key = torch.randn(1, 1, 1, 2)
    keys, _ = cache.update(key, key)
    assert torch.equal(keys, key)


def test_reorder_continues_other_sequences():
    cache = StaticCache(3, 1, 4, 2)
    key, value = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2)
    cache.update(key, value)
    index = torch.tensor([2, 0, 0])
    cache.reorder(index)
    assert torch.equal(cache.keys[:, :, :2], key[index])
    assert torch.equal(cache.values[:, :, :2], value[index])
    assert cache.length == 2


def test_nbytes_counts_keys_and_values():
    assert StaticCache(2, 3, 8, 4).nbytes() == 2 * (2 * 3 * 8 * 4) * 4
    assert StaticCache(2, 3, 8, 4, value_dim=6, dtype=torch.bfloat16).nbytes() == 2 * 3 * 8 * (4 + 6) * 2


def test_type_and_device_are_as_asked():
    cache = StaticCache(1, 1, 2, 2, dtype=torch.float64, device="meta")
    assert cache.keys.dtype == torch.float64
    assert cache.values.device.type == "meta"


X = torch.zeros(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.update(X[0], X), "key: expected a tensor (B, Hkv, L, D), got float32 tensor of shape (3, 5, 4)"),
        (
            lambda c: c.update(X[:1], X[:1]),
            "key: expected shape (2, 3, 5, 4), to fit the cache, got float32 tensor of shape (1, 3, 5, 4)",
        ),
        (
            lambda c: c.update(X, X[:, :, :4]),
            "value: expected shape (2, 3, 5, 4), to fit the cache, got float32 tensor of shape (2, 3, 4, 4)",
        ),
        (lambda c: (c.update(X, X), c.update(X, X)), "key: expected at most 3 more positions, got 5"),
        (lambda c: c.reorder(torch.tensor([0])), "index: expected 2 integers in [0, 1], got [0]"),
        (lambda c: c.reorder(torch.tensor([0, 2])), "index: expected 2 integers in [0, 1], got [0, 2]"),
        (lambda c: c.reorder(torch.tensor([-1, 0])), "index: expected 2 integers in [0, 1], got [-1, 0]"),
        (
            lambda c: c.reorder(torch.tensor([0.0, 1.0])),
            "index: expected a int64 or int32 tensor, got float32 tensor of shape (2,)",
        ),
        (lambda c: StaticCache(0, 1, 1, 1), "batch_size: expected an integer ≥ 1, got 0"),
        (lambda c: StaticCache(1, 0, 1, 1), "num_kv_heads: expected an integer ≥ 1, got 0"),
        (lambda c: StaticCache(1, 1, 0, 1), "max_length: expected an integer ≥ 1, got 0"),
        (lambda c: StaticCache(1, 1, 1, 0), "head_dim: expected an integer ≥ 1, got 0"),
        (lambda c: StaticCache(1, 1, 1, 1, value_dim=0), "value_dim: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, text):
    with complains(text):
        call(StaticCache(2, 3, 8, 4))


def test_an_overflow_leaves_the_cache_as_it_was():
    cache = StaticCache(2, 3, 8, 4)
    cache.update(X, X)
    with pytest.raises(ValueError, match="at most 3 more"):
        cache.update(X, X)
    assert cache.length == 5
    assert cache.update(X[:, :, :3], X[:, :, :3])[0].shape[2] == 8
