"""Every byte of every tensor arrives, whatever the sizes; files that are short or missing are named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_device import FakeDevice

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.configuration import PoolSettings, UploadSettings
from redshard.worker.device.base import DeviceError
from redshard.worker.memory.packing import plan_packing
from redshard.worker.memory.pool import MemoryPool, PoolError
from redshard.worker.memory.upload import UploadError, upload

SMALL = UploadSettings(staging_bytes="4KiB", sync_bytes="10KiB")
POOL = PoolSettings(segment_bytes="64KiB")


@dataclass(frozen=True)
class Tensor:
    name: str
    path: Path
    offset: int
    nbytes: int
    type: QuantType = QuantType.I8


def write_tensors(path, sizes, gap=5):
    """A file of random bytes and the tensors in it, `gap` bytes apart."""
    tensors, offset = [], gap
    for i, nbytes in enumerate(sizes):
        tensors.append(Tensor(f"{path.name} {i}", path, offset, nbytes))
        offset += nbytes + gap
    data = np.random.default_rng().integers(0, 256, offset, np.uint8)
    path.write_bytes(data.tobytes())
    return tensors, {t.name: data[t.offset : t.offset + t.nbytes] for t in tensors}


def allocate(pool, tensors):
    return pool.allocate_weights(plan_packing([(t.name, t.nbytes) for t in tensors], pool.settings))


def check_arrival(device, tensors, contents, upload_settings):
    with MemoryPool(device, POOL) as pool:
        views = allocate(pool, tensors)
        calls = []
        total = sum(t.nbytes for t in tensors)
        assert upload(pool, iter(tensors), views, upload_settings, lambda *call: calls.append(call)) == total
        for tensor in tensors:
            np.testing.assert_array_equal(pool.read(views[tensor.name]), contents[tensor.name])
    done = [bytes_done for bytes_done, _ in calls]
    assert done == sorted(set(done))
    assert all(of == total for _, of in calls)
    assert not tensors or done[-1] == total
    assert not device.host_buffers


@given(
    sizes=st.lists(st.integers(1, 20_000) | st.sampled_from([4095, 4096, 4097, 8192]), max_size=12),
    staging_buffers=st.integers(2, 4),
    sync_bytes=st.integers(4096, 30_000),
    refuse=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_byte_arrives(tmp_path, sizes, staging_buffers, sync_bytes, refuse):
    tensors, contents = write_tensors(tmp_path / "model", sizes)
    chosen = UploadSettings(staging_bytes="4KiB", staging_buffers=staging_buffers, sync_bytes=sync_bytes)
    check_arrival(FakeDevice(refuse_view_reads=refuse), tensors, contents, chosen)


def test_tensors_of_several_files_in_any_order(tmp_path):
    one, contents = write_tensors(tmp_path / "one", [70_001, 3, 4096])
    two, more = write_tensors(tmp_path / "two", [100_000, 12_345], gap=0)
    check_arrival(FakeDevice(), [two[1], one[2], one[0], two[0], one[1]], contents | more, SMALL)


def test_default_settings(tmp_path):
    tensors, contents = write_tensors(tmp_path / "model", [40_000_003, 17])
    check_arrival(FakeDevice(), tensors, contents, None)


def test_the_gate_bounds_what_is_in_flight(tmp_path, monkeypatch):
    tensors, _ = write_tensors(tmp_path / "model", [300_000])
    device = FakeDevice()
    copied = gates = 0
    longest = 0
    copy_in, synchronize = device.copy_in, device.synchronize

    def counted_copy(destination, source, nbytes, offset=0):
        nonlocal copied
        copied += nbytes
        copy_in(destination, source, nbytes, offset)

    def counted_synchronize(deadline=None):
        nonlocal copied, gates, longest
        longest = max(longest, copied)
        copied, gates = 0, gates + 1
        synchronize(deadline)

    with MemoryPool(device, POOL) as pool:
        views = allocate(pool, tensors)
        device.largest_queue = 0
        monkeypatch.setattr(device, "copy_in", counted_copy)
        monkeypatch.setattr(device, "synchronize", counted_synchronize)
        upload(pool, tensors, views, SMALL)
        assert copied == 0
        assert longest <= SMALL.sync_bytes + SMALL.staging_bytes
        assert gates >= 300_000 // (SMALL.sync_bytes + SMALL.staging_bytes)
        assert device.largest_queue <= SMALL.staging_buffers * SMALL.staging_bytes


@pytest.mark.parametrize("missing", [1, 5_000, 150_000])
def test_a_file_cut_short_is_named_with_the_tensor_and_the_bytes(tmp_path, missing):
    tensors, _ = write_tensors(tmp_path / "model", [100_000, 100_000], gap=0)
    with open(tmp_path / "model", "r+b") as file:
        file.truncate(200_000 - missing)
    device = FakeDevice()
    with MemoryPool(device, POOL) as pool:
        views = allocate(pool, tensors)
        with pytest.raises(UploadError, match=rf"model is cut short: .*file ends at {200_000 - missing}"):
            upload(pool, tensors, views, SMALL)
    assert not device.host_buffers
    assert not device.live


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "cannot open .*No such file"), ("", "Is a directory")]
)
def test_files_that_cannot_be_read_are_named(tmp_path, path, message):
    tensor = Tensor("t", tmp_path / path, 0, 10)
    with MemoryPool(FakeDevice()) as pool:
        views = allocate(pool, [tensor])
        with pytest.raises(UploadError, match=message):
            upload(pool, [tensor], views)


def test_views_must_be_the_tensors(tmp_path):
    (tensor, other), _ = write_tensors(tmp_path / "model", [10, 20])
    with MemoryPool(FakeDevice()) as pool:
        views = allocate(pool, [tensor])
        with pytest.raises(UploadError, match="'model 1'"):
            upload(pool, [tensor, other], views)
        wrong = {tensor.name: views[tensor.name].view(0, 9)}
        with pytest.raises(UploadError, match=r"10 bytes in .*model, but 9"):
            upload(pool, [tensor], wrong)


def test_a_failing_copy_leaves_nothing_behind(tmp_path, monkeypatch):
    tensors, _ = write_tensors(tmp_path / "model", [100_000])
    device = FakeDevice()
    with MemoryPool(device, POOL) as pool:
        views = allocate(pool, tensors)
        copy_in, calls = device.copy_in, 0

        def failing_copy(*arguments):
            nonlocal calls
            calls += 1
            if calls == 7:
                raise DeviceError("copy_in: device lost")
            copy_in(*arguments)

        monkeypatch.setattr(device, "copy_in", failing_copy)
        with pytest.raises(DeviceError, match="device lost"):
            upload(pool, tensors, views, SMALL)
    assert not device.host_buffers


def test_views_of_a_closed_pool_are_refused(tmp_path):
    tensors, _ = write_tensors(tmp_path / "model", [10])
    device = FakeDevice()
    with MemoryPool(device) as pool:
        views = allocate(pool, tensors)
    with pytest.raises(PoolError, match="freed"):
        upload(pool, tensors, views)
    assert not device.host_buffers


MEASURE = """
import resource, sys
from pathlib import Path
from support.fake_device import FakeDevice
from redshard.worker.memory.pool import MemoryPool
from redshard.worker.memory.packing import plan_packing
from redshard.worker.memory.upload import upload
sys.path.insert(0, sys.argv[1])
from test_upload import Tensor
nbytes = int(sys.argv[3])
tensors = [Tensor(str(i), Path(sys.argv[2]), i * nbytes // 4, nbytes // 4) for i in range(4)]
pool = MemoryPool(FakeDevice())
views = pool.allocate_weights(plan_packing([(t.name, t.nbytes) for t in tensors], pool.settings))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
upload(pool, tensors, views)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_an_upload_adds_little_more_than_the_weights_to_resident_memory(tmp_path):
    nbytes = 256 << 20
    with open(tmp_path / "model", "wb") as file:
        file.truncate(nbytes)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(tmp_path / "model"), str(nbytes)],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ).stdout
    assert int(output) <= nbytes + (64 << 20)
