"""The pool, the upload and the cache on every device of this machine, and on a stand-in AMD GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import standin
from support.gguf_models import tiny_config

from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.cache_groups import cache_groups
from redshard.worker.configuration import PoolSettings, UploadSettings
from redshard.worker.device.base import Device, DeviceError
from redshard.worker.device.choose import open_device
from redshard.worker.memory.kv_cache import KVCache
from redshard.worker.memory.packing import plan_packing
from redshard.worker.memory.pool import MemoryPool, PoolError
from redshard.worker.memory.upload import upload

SIZES = [3_000_001, 70_000, 4_096, 17, 1, 999_999]


@pytest.fixture(params=["cpu", "hip", "cuda"])
def device(request, monkeypatch) -> Iterator[Device]:
    if request.param == "hip":
        standin.activate(monkeypatch)
    try:
        opened = open_device(request.param)
    except DeviceError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.mark.parametrize("readback", ["probe", "bounce"])
def test_uploaded_bytes_come_back(device, readback, tmp_path: Path):
    data = np.random.default_rng().integers(0, 256, sum(SIZES), np.uint8)
    (tmp_path / "model").write_bytes(data.tobytes())
    starts = np.cumsum([0, *SIZES[:-1]]).tolist()
    tensors = [
        SimpleNamespace(
            name=f"t{start}", path=tmp_path / "model", offset=start, nbytes=nbytes, type=QuantType.I8
        )
        for start, nbytes in zip(starts, SIZES, strict=True)
    ]
    settings = PoolSettings(segment_bytes="1MiB", readback=readback)
    with MemoryPool(device, settings) as pool:
        views = pool.allocate_weights(plan_packing([(t.name, t.nbytes) for t in tensors], settings))
        upload(pool, tensors, views, UploadSettings(staging_bytes="64KiB", sync_bytes="300KiB"))
        for tensor in tensors:
            expected = data[tensor.offset : tensor.offset + tensor.nbytes]
            np.testing.assert_array_equal(pool.read(views[tensor.name]), expected)
        part = views["t0"].view(1_000_003, 1_500_000, alignment=1)
        np.testing.assert_array_equal(pool.read(part), data[1_000_003:2_500_003])


@pytest.mark.parametrize("readback", ["probe", "bounce"])
def test_copy_out_can_be_recorded(device, readback):
    with MemoryPool(device, PoolSettings(readback=readback)) as pool:
        view = pool.allocate("x", 2_000_000).view(256, 1_500_000)
        host = device.allocate_host(1_500_100)
        graphs = []
        with device.recording(graphs):
            pool.copy_out(host, view, offset=100)
        for _ in range(3):
            values = np.random.default_rng().integers(0, 256, view.nbytes, np.uint8)
            pool.write(view, values)
            graphs[0].replay()
            device.synchronize()
            np.testing.assert_array_equal(host.array[100:1_500_100], values)
        graphs[0].release()
        device.free_host(host)


def test_cache_regions_hold_what_is_written_to_them(device):
    with MemoryPool(device) as pool:
        (group,) = cache_groups(tiny_config(head_dim=40, value_dim=24, n_kv_heads=[2, 1]), range(2))
        cache = KVCache(pool, group, n_blocks=7)
        regions = [region for layer in range(2) for region in (cache.keys[layer], cache.values[layer])]
        for byte, region in enumerate(regions, start=1):
            device.fill(region.address, byte, region.nbytes)
        for byte, region in enumerate(regions, start=1):
            assert (pool.read(region) == byte).all()


def test_an_allocation_beyond_the_device_is_refused(device):
    with MemoryPool(device) as pool:
        with pytest.raises(PoolError, match="too large"):
            pool.allocate("too large", 1 << 46)
        assert pool.allocate("small", 4096).address % 256 == 0
