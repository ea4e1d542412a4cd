"""Sizes, addresses and slots of the paged cache."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from support.fake_device import FakeDevice

from redshard.worker.memory.kv_cache import KVCache, KVCacheLayout, LayerShape
from redshard.worker.memory.pool import MemoryPool, PoolError

LAYOUT = KVCacheLayout((LayerShape(2, 64, 64), LayerShape(3, 40, 24)), block_size=16)


def int32(*values):
    return np.array(values, np.int32)


def test_bytes_of_a_llama_3_8b_token():
    layout = KVCacheLayout((LayerShape(8, 128, 128),) * 32)
    assert layout.block_size == 32
    assert layout.bytes_per_token == 131072
    assert layout.nbytes(10) == 10 * 32 * 131072


def test_slots_stay_within_int32():
    layout = KVCacheLayout((LayerShape(1, 1, 1),), block_size=32)
    with MemoryPool(FakeDevice()) as pool, pytest.raises(ValueError, match=r"2\*\*31"):
        KVCache(pool, layout, 1 << 26)


def test_one_allocation_with_every_layer_apart():
    device = FakeDevice()
    with MemoryPool(device) as pool:
        before = device.allocations
        cache = KVCache(pool, LAYOUT, n_blocks=5)
        assert device.allocations == before + 1
        views = [view for layer in range(2) for view in (cache.keys(layer), cache.values(layer))]
        assert [view.nbytes for view in views] == [
            2 * 5 * heads * 16 * dim for heads, dim in ((2, 64), (2, 64), (3, 40), (3, 24))
        ]
        assert sum(view.nbytes for view in views) == LAYOUT.nbytes(5)
        assert all(view.address % 256 == 0 for view in views)
        for first, second in pairwise(views):
            assert first.address + first.nbytes <= second.address
        with pytest.raises(PoolError, match="in use"):
            pool.close()
    with pytest.raises(PoolError, match="freed"):
        _ = cache.keys(0).address
    assert not device.live


def test_a_cache_that_does_not_fit_is_refused():
    device = FakeDevice(total_memory=4 << 20)
    with MemoryPool(device) as pool:
        with pytest.raises(PoolError, match=r"kv cache.*out of memory"):
            KVCache(pool, LAYOUT, n_blocks=1000)
        with pytest.raises(ValueError, match="0 blocks"):
            KVCache(pool, LAYOUT, n_blocks=0)


@pytest.mark.parametrize("shape", [LayerShape(0, 64, 64), LayerShape(2, -1, 64)])
def test_shapes_without_elements_are_refused(shape):
    with pytest.raises(ValueError, match="above zero"):
        KVCacheLayout((shape,))


def test_a_layout_needs_layers():
    with pytest.raises(ValueError, match="needs layers"):
        KVCacheLayout(())
