"""Sizes and addresses of the paged cache."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.fake_device import FakeDevice
from support.gguf_models import attention_of, tiny_config

from redshard.loader.model.cache_groups import CacheGroup
from redshard.worker.memory.kv_cache import KVCache
from redshard.worker.memory.pool import MemoryPool, PoolError

#: Two layers that keep different heads, of different sizes.
GROUP = CacheGroup(
    (
        (3, attention_of(tiny_config(n_heads=2, n_kv_heads=2, head_dim=64))),
        (5, attention_of(tiny_config(n_heads=3, n_kv_heads=3, head_dim=40, value_dim=24))),
    )
)


def test_slots_stay_within_int32():
    with MemoryPool(FakeDevice()) as pool, pytest.raises(ValueError, match=r"2\*\*31"):
        KVCache(pool, GROUP, n_blocks=1 << 26, block_size=32)


def test_one_allocation_with_every_layer_apart():
    device = FakeDevice()
    with MemoryPool(device) as pool:
        before = device.allocations
        cache = KVCache(pool, GROUP, n_blocks=5, block_size=16)
        assert device.allocations == before + 1
        views = [view for layer in (3, 5) for view in (cache.keys[layer], cache.values[layer])]
        assert [view.nbytes for view in views] == [
            2 * 5 * heads * 16 * dim for heads, dim in ((2, 64), (2, 64), (3, 40), (3, 24))
        ]
        assert sum(view.nbytes for view in views) == cache.nbytes == 5 * 16 * GROUP.bytes_per_token
        assert all(view.address % 256 == 0 for view in views)
        for first, second in pairwise(views):
            assert first.address + first.nbytes <= second.address
        with pytest.raises(PoolError, match="in use"):
            pool.close()
    with pytest.raises(PoolError, match="freed"):
        _ = cache.keys[3].address
    assert not device.live


def test_a_cache_that_does_not_fit_is_refused():
    device = FakeDevice(total_memory=4 << 20)
    with MemoryPool(device) as pool:
        with pytest.raises(PoolError, match=r"kv cache.*out of memory"):
            KVCache(pool, GROUP, n_blocks=1000)
        with pytest.raises(ValueError, match="0 blocks"):
            KVCache(pool, GROUP, n_blocks=0)
