"""`CpuDevice` against the device contract, and what control groups leave it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from redshard.worker.device import cgroup
from redshard.worker.device.arguments import Activation, RmsNormArguments, Step
from redshard.worker.device.base import DeviceError, Graph
from redshard.worker.device.cpu import CpuDevice


@pytest.fixture
def device() -> CpuDevice:
    return CpuDevice(2)


def test_properties(device: CpuDevice) -> None:
    free, total = device.memory_info()
    assert 0 < free <= total == device.properties.total_memory
    assert device.properties.compute_units == 2
    assert device.properties.arch in device.properties.features


def test_bytes_go_in_within_and_out(device: CpuDevice) -> None:
    nbytes = 3_000_001
    host = device.allocate_host(nbytes)
    host.array[:] = np.random.default_rng().integers(0, 256, nbytes)
    expected = host.array.copy()
    first, second = device.allocate(nbytes), device.allocate(nbytes)
    device.copy_in(first, host, nbytes)
    device.fill(second, 7, nbytes)
    device.copy(second + 5, first, nbytes - 5)
    device.copy(second + 6, second + 5, 1000)  # ranges may overlap
    device.record_event().synchronize(1.0)
    host.array[:] = 0
    device.copy_out(host, second, nbytes - 1, offset=1)
    device.synchronize(1.0)
    moved = np.concatenate([np.full(5, 7, np.uint8), expected[:1], expected[:1000], expected[1001:-5]])
    np.testing.assert_array_equal(host.array[1:], moved[:-1])
    device.free_host(host)
    device.close()


def test_ranges_outside_host_buffers_are_refused(device: CpuDevice) -> None:
    host, address = device.allocate_host(100), device.allocate(200)
    for nbytes, offset in ((101, 0), (100, 1), (-1, 0), (1, -1)):
        with pytest.raises(DeviceError, match="host buffer of 100 bytes"):
            device.copy_in(address, host, nbytes, offset)
        with pytest.raises(DeviceError, match="host buffer of 100 bytes"):
            device.copy_out(host, address, nbytes, offset)
    with pytest.raises(DeviceError, match="nbytes must not be negative"):
        device.copy(address, address, -1)
    with pytest.raises(DeviceError, match="not a byte value"):
        device.fill(address, 256, 1)
    device.close()


def test_allocations_that_cannot_be_are_refused(device: CpuDevice) -> None:
    for nbytes in (-1, 1 << 62, device.memory_info()[1] + 1):
        with pytest.raises(DeviceError, match=f"allocate\\({nbytes}\\).*bytes are free"):
            device.allocate(nbytes)
    address = device.allocate(10)
    assert address % 256 == 0
    device.free(address)
    with pytest.raises(DeviceError, match="not an allocation"):
        device.free(address)
    device.close()
    device.close()


def test_devices_that_cannot_be_are_refused() -> None:
    with pytest.raises(DeviceError, match="n_threads"):
        CpuDevice(0)
    with pytest.raises(DeviceError, match="'sse9' is not available"):
        CpuDevice(1, "sse9")


class Norm:
    """A norm over four rows of 32 ones and twos in device memory."""

    def __init__(self, device: CpuDevice) -> None:
        self.device = device
        self.host = device.allocate_host(4 * 32 * 4)
        self.step, self.x, self.weight, self.out = (device.allocate(4096) for _ in range(4))
        step = device.allocate_host(ctypes.sizeof(Step))
        step.array[:] = np.frombuffer(bytes(Step(4, 1, 0, 0)), np.uint8)
        device.copy_in(self.step, step, step.array.nbytes)
        self.host.array.view(np.float32)[:] = 1
        device.copy_in(self.weight, self.host, 32 * 4)
        self.arguments = RmsNormArguments(
            step=self.step,
            x=self.x,
            weight=self.weight,
            out=Activation(values=self.out),
            width=32,
            eps=0.0,
        )


def test_recorded_copies_fills_and_launches_run_on_replay(device: CpuDevice) -> None:
    norm = Norm(device)
    values = norm.host.array.view(np.float32).reshape(4, 32)
    graphs: list[Graph] = []
    device.fill(norm.out, 0, 4096)
    with device.recording(graphs):
        device.copy_in(norm.x, norm.host, norm.host.array.nbytes)
        device.launch("rms_norm", norm.arguments, 4)
        device.fill(norm.out, 0, 32 * 4)
        device.copy_out(norm.host, norm.out, norm.host.array.nbytes)
    norm.arguments.width = 1  # the graph has its own copy
    np.testing.assert_array_equal(values, 1)  # nothing has run yet
    for factor in (3, -5):
        values[:] = factor
        graphs[0].replay()
        np.testing.assert_array_equal(values[0], 0)
        np.testing.assert_allclose(values[1:], np.sign(factor), rtol=1e-6)
    graphs[0].release()
    graphs[0].release()
    with pytest.raises(DeviceError, match="released"):
        graphs[0].replay()
    device.close()


def test_bad_launches_are_refused_when_they_are_made(device: CpuDevice) -> None:
    norm = Norm(device)
    graphs: list[Graph] = []
    for recording in (False, True):
        if recording:
            device.begin_recording()
        with pytest.raises(DeviceError, match="unknown kernel 'copy'"):
            device.launch("copy", norm.arguments, 1)
        with pytest.raises(DeviceError, match="rms_norm: argument block of 16 bytes"):
            device.launch("rms_norm", Step(), 1)
        with pytest.raises(DeviceError, match="rms_norm: width must be positive"):
            device.launch("rms_norm", RmsNormArguments(step=1, x=1, weight=1, out=Activation(values=1)), 1)
    with pytest.raises(DeviceError, match="while recording"):
        device.begin_recording()
    device.end_recording().release()
    with pytest.raises(DeviceError, match="without begin_recording"):
        device.end_recording()
    with pytest.raises(RuntimeError, match="stop"), device.recording(graphs):
        raise RuntimeError("stop")
    assert not graphs
    device.close()


def test_scratch_suffices_for_one_long_row_and_is_bounded_for_many(device: CpuDevice) -> None:
    one = device.scratch_bytes(1, 1, 32, 128, 131_072, 131_072)
    assert one >= 32 * 1024 * 128 * 4
    assert device.scratch_bytes(512, 8, 32, 128, 131_072, 1 << 20) <= max(one, 32 << 20)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    version_2 = tmp_path / "v2"
    group = version_2 / "pod" / "container"
    group.mkdir(parents=True)
    membership.write_text("0::/pod/container\n")
    assert cgroup.memory_limit(version_2, membership) is None
    assert cgroup.available_memory(version_2, membership) is None
    assert cgroup.cpu_limit(version_2, membership) is None
    (group / "memory.max").write_text("max\n")
    (version_2 / "pod" / "memory.max").write_text("1000000\n")
    (version_2 / "pod" / "memory.current").write_text("900000\n")
    (version_2 / "pod" / "memory.stat").write_text("anon 5\ninactive_file 50000\n")
    (version_2 / "pod" / "cpu.max").write_text("150000 100000\n")
    (group / "cpu.max").write_text("max 100000\n")
    assert cgroup.memory_limit(version_2, membership) == 1_000_000
    assert cgroup.available_memory(version_2, membership) == 150_000
    assert cgroup.cpu_limit(version_2, membership) == 1.5

    version_1 = tmp_path / "v1"
    (version_1 / "memory").mkdir(parents=True)
    (version_1 / "cpu").mkdir()
    membership.write_text("4:memory:/of/the/host\n2:cpu,cpuacct:/\n0::/\n")
    (version_1 / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert cgroup.memory_limit(version_1, membership) is None
    (version_1 / "memory" / "memory.limit_in_bytes").write_text("5000")
    (version_1 / "memory" / "memory.usage_in_bytes").write_text("6000")
    (version_1 / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (version_1 / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cgroup.available_memory(version_1, membership) == 0
    assert cgroup.cpu_limit(version_1, membership) is None
    (version_1 / "cpu" / "cpu.cfs_quota_us").write_text("400000")
    assert cgroup.cpu_limit(version_1, membership) == 4
