"""The cache of encoded prompts and pictures: what it keeps, what it drops, and what counts."""

from __future__ import annotations

import pytest
import torch

from mogle_rt.encoders.cache import TensorCache

pytestmark = pytest.mark.quick


def test_the_least_recently_used_entry_is_dropped() -> None:
    cache = TensorCache(3 * 1000)
    for name in "abc":
        cache.put(name, (torch.zeros(200),))
    assert cache.get("a") is not None
    cache.put("d", (torch.zeros(200),))
    kept = [name for name in "abcd" if cache.get(name) is not None]
    assert kept == ["a", "c", "d"]
    assert (cache.hits, cache.misses) == (4, 1)


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache = TensorCache(1000)
    cache.put("a", (torch.zeros(200),))
    cache.put("b", (torch.zeros(300),))
    assert cache.get("b") is None
    assert cache.get("a") is not None


def test_keys_count() -> None:
    """The prompt itself is kept as the entry's key, and can take more memory than its embeddings."""
    cache = TensorCache(10_000)
    cache.put(("a", 8), (torch.zeros(10),))
    assert len(cache) == 1
    cache.put(("b" * 20_000, 8), (torch.zeros(10),))
    assert len(cache) == 1
    for i in range(9):
        cache.put((str(i) * 3000, 8), (torch.zeros(10),))
        assert cache.nbytes < 10_000
    assert len(cache) == 3
    cache.put(("8" * 3000, 8), (torch.zeros(10),))
    assert len(cache) == 3
    cache.clear()
    assert cache.nbytes == 0
