"""The HIP device by hip-python's own calls, on the stand-in runtime, behaving and misbehaving."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hip import hip
from support import standin

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device import kernel_images, kernel_set, sources
from redshard.worker.device.arguments import EmbedArguments, Matrix, SwigluArguments
from redshard.worker.device.base import Device, DeviceError, Graph
from redshard.worker.device.choose import open_device
from redshard.worker.device.cpu import CpuDevice
from redshard.worker.device.hip import HipDevice
from redshard.worker.device.watchdog import EXIT_HUNG

MIB = 1 << 20

Open = Callable[..., HipDevice]


@pytest.fixture
def open_hip(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a device on a stand-in runtime of such settings."""
    devices: list[HipDevice] = []

    def opener(ordinal: int = 0, **settings: str | int) -> HipDevice:
        standin.activate(monkeypatch, **settings)
        devices.append(HipDevice(ordinal))
        return devices[-1]

    yield opener
    for device in devices:
        device.close()


def embed(device: Device, rows: int = 2, table_type: QuantType = QuantType.F32) -> tuple[int, int]:
    """Launch a small operation; addresses of its table, 8 x 32, and of its result."""
    table, step, out = (device.allocate(nbytes) for nbytes in (1024, 256, 32 * 4 * rows))
    host = device.allocate_host(2048)
    host.array[:1024].view(np.float32)[:] = np.arange(256)
    host.array[1024:1040].view(np.int32)[:] = [rows, 1, 0, 0]
    host.array[1040:].view(np.int32)[:2] = [7, 3]
    device.copy_in(table, host, 1024)
    device.copy_in(step, host, 256, 1024)
    device.synchronize()
    arguments = EmbedArguments(step, step + 16, None, Matrix(table, 0, table_type.ggml_id, 8), out, 32, 1.0)
    device.launch("embed", arguments, rows)
    return table, out


def fetch(device: Device, address: int, count: int) -> np.ndarray:
    host = device.allocate_host(4 * count)
    device.copy_out(host, address, 4 * count)
    device.synchronize()
    values = host.array.view(np.float32).copy()
    device.free_host(host)
    return values


def run_python(script: str, **settings: str | int) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own that sees stand-in GPUs."""
    environment = os.environ | standin.environment(**settings) | {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arch", "wave_size", "features"),
    [("gfx1100", 32, {"wmma"}), ("gfx942:sramecc+:xnack-", 64, {"mfma"}), ("gfx906", 64, set())],
)
def test_properties(open_hip: Open, arch: str, wave_size: int, features: set[str]) -> None:
    properties = open_hip(arch=arch, memory=3 << 30).properties
    assert properties.name == "Stand-in GPU 0"
    assert (properties.arch, properties.wave_size) == (arch.split(":")[0], wave_size)
    assert (properties.total_memory, properties.lds_bytes) == (3 << 30, 64 << 10)
    assert properties.features == features
    assert properties.compute_units == 4


def test_calls_are_about_their_own_gpu(open_hip: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def current_after(device: HipDevice) -> int:
        device.free(device.allocate(256))
        return int(hip.hipGetDevice()[1])

    first, second = (open_hip(ordinal, devices=2) for ordinal in range(2))
    assert [current_after(device) for device in (first, second, second, first)] == [0, 1, 1, 0]
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(current_after(second)))
    thread.start()
    thread.join()
    assert found == [1]
    assert current_after(first) == 0


def test_a_gpu_that_cannot_be_made_current_is_asked_again(
    open_hip: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (open_hip(ordinal, devices=2) for ordinal in range(2))
    first.allocate(256)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")  # the stand-in looks at every call
    for _ in range(2):
        with pytest.raises(DeviceError, match="hipSetDevice"):
            second.allocate(256)
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    second.allocate(256)


def test_each_visible_gpu_can_be_opened_by_its_number(
    open_hip: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_hip(1, devices=3).properties.name == "Stand-in GPU 1"
    assert open_hip(1, devices=3).can_access(0)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2")
    assert HipDevice().properties.name == "Stand-in GPU 2"
    with pytest.raises(DeviceError, match="no HIP device number 1: the runtime reports 1"):
        HipDevice(1)


def test_allocations_are_aligned_and_counted(open_hip: Open) -> None:
    device = open_hip(memory=64 * MIB)
    addresses = [device.allocate(nbytes) for nbytes in (1, 255, 4097, MIB)]
    assert not any(address % 256 for address in addresses)
    assert device.memory_info() == (64 * MIB - 1 - 255 - 4097 - MIB, 64 * MIB)
    for address in addresses:
        device.free(address)
    assert device.memory_info()[0] == 64 * MIB
    with pytest.raises(DeviceError, match="not an allocation"):
        device.free(addresses[0])
    with pytest.raises(DeviceError, match="at least one byte"):
        device.allocate(0)


def test_an_error_names_call_gpu_and_sizes_and_gives_a_hint(open_hip: Open) -> None:
    device = open_hip(memory=MIB)
    with pytest.raises(DeviceError) as caught:
        device.allocate(2 * MIB)
    for part in (
        "hipMalloc(2097152 bytes)",
        "GPU 0 (Stand-in GPU 0, gfx1100)",
        "hipErrorOutOfMemory (2)",
        "1048576 of 1048576 bytes are free",
        "smaller cache",
    ):
        assert part in str(caught.value)
    with pytest.raises(DeviceError, match=r"hipMemcpyAsync\(512 bytes within, .*hipErrorInvalidValue"):
        device.copy(device.allocate(256), device.allocate(256), 512)


def test_copies_run_in_order_and_later(open_hip: Open) -> None:
    device = open_hip()
    host, a, b = device.allocate_host(1000), device.allocate(1000), device.allocate(1000)
    host.array[:] = 1
    device.copy_in(a, host, 500, 500)
    device.fill(a + 100, 7, 50)
    device.copy(b, a, 300)
    event = device.record_event()
    event.synchronize()
    host.array[:] = 0
    device.copy_out(host, b, 300, 10)
    device.copy_out(host, a + 400, 100, 900)
    device.synchronize()
    expected = np.zeros(1000, np.uint8)
    expected[10:310] = 1
    expected[110:160] = 7
    expected[900:] = 1
    np.testing.assert_array_equal(host.array, expected)
    with pytest.raises(DeviceError, match="600 bytes at offset 500 of a host buffer of 1000"):
        device.copy_in(a, host, 600, 500)


def test_an_event_covers_what_came_before_it_alone(open_hip: Open) -> None:
    device = open_hip()
    host, a = device.allocate_host(16), device.allocate(16)
    device.fill(a, 1, 16)
    device.copy_out(host, a, 16)
    first = device.record_event()
    device.fill(a, 2, 16)
    device.copy_out(host, a, 16)
    first.synchronize()
    assert (host.array == 1).all()
    device.synchronize()
    assert (host.array == 2).all()


def test_events_are_used_again(open_hip: Open) -> None:
    device = open_hip()
    for _ in range(50):
        device.record_event().synchronize()
    assert len(device.free_events) == 1


def test_a_graph_replays_launches_and_copies(open_hip: Open) -> None:
    device = open_hip()
    table, out = embed(device)
    device.synchronize()
    host = device.allocate_host(1024)
    graphs: list[Graph] = []
    with device.recording(graphs):
        device.copy_in(table, host, 1024)
        embed(device)  # its own copies and allocations are recorded, or happen at once
        arguments_out = device.allocate(256)
        device.copy(arguments_out, table + 7 * 128, 128)
    for factor in (2, 3):
        host.array.view(np.float32)[:] = np.arange(256) * factor
        graphs[0].replay()
        np.testing.assert_array_equal(fetch(device, arguments_out, 32), np.arange(224, 256) * factor)
    graphs[0].release()
    graphs[0].release()
    with pytest.raises(DeviceError, match="released"):
        graphs[0].replay()
    assert standin.count("replays") == 2
    np.testing.assert_array_equal(fetch(device, out, 64), [*range(224, 256), *range(96, 128)])


def test_arguments_of_a_launch_are_copied(open_hip: Open) -> None:
    device = open_hip()
    _, out = embed(device)
    step = device.allocate(256)
    arguments = EmbedArguments(step, step + 16, None, Matrix(step, 0, 0, 8), out, 32, 1.0)
    graphs: list[Graph] = []
    with device.recording(graphs):
        device.fill(step, 0, 256)  # no rows
        device.launch("embed", arguments, 2)
        arguments.out = 0
        arguments.step = 0
    graphs[0].replay()
    device.synchronize()


def test_a_recording_that_fails_leaves_the_device_usable(open_hip: Open) -> None:
    device = open_hip()
    graphs: list[Graph] = []
    with pytest.raises(DeviceError, match="unknown kernel 'nothing'"), device.recording(graphs):
        device.launch("nothing", EmbedArguments(), 1)
    with pytest.raises(DeviceError, match="hipErrorInvalidValue"), device.recording(graphs):
        device.copy(4096, 4096, 10)
    assert not graphs
    _, out = embed(device)
    assert fetch(device, out, 1)[0] == 224
    with pytest.raises(DeviceError, match="without begin_recording"):
        device.end_recording()


def test_kernels_that_do_not_exist_are_named(open_hip: Open) -> None:
    device = open_hip()
    with pytest.raises(DeviceError, match="no kernel for weights of type Q5_K; known are F32,"):
        embed(device, table_type=QuantType.Q5_K)
    arguments = SwigluArguments(gate=Matrix(0, 0, 8, 32), up=Matrix(0, 0, 12, 32))
    with pytest.raises(DeviceError, match="gate is Q8_0, up is Q4_K"):
        device.launch("swiglu", arguments, 1)


def test_any_thread_may_drive_the_device(open_hip: Open) -> None:
    device = open_hip()
    results: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: results.append(fetch(device, embed(device)[1], 1)))
    thread.start()
    thread.join()
    assert results[0][0] == 224


def test_close_frees_everything_and_may_be_repeated(open_hip: Open) -> None:
    device = open_hip()
    embed(device)
    graphs: list[Graph] = []
    with device.recording(graphs):
        device.fill(device.allocate(256), 0, 256)
    device.close()
    device.close()
    assert standin.count("live allocations") == 0


SHARE = """
import sys
import numpy as np
from redshard.worker.device.hip import HipDevice
device = HipDevice()
address = device.open_shared(bytes.fromhex(sys.stdin.readline()))
host = device.allocate_host(5000)
device.copy_out(host, address, 5000)
device.synchronize()
host.array[:] += 1
device.copy_in(address, host, 5000)
device.synchronize()
device.close_shared(address)
"""


def test_an_allocation_can_be_shared_with_another_process(open_hip: Open) -> None:
    device = open_hip()
    address, host = device.allocate(5000), device.allocate_host(5000)
    host.array[:] = np.arange(5000) % 250
    device.copy_in(address, host, 5000)
    device.synchronize()
    subprocess.run(
        [sys.executable, "-c", SHARE],
        input=device.share(address).hex(),
        env=os.environ | standin.environment() | {"PYTHONPATH": ":".join(sys.path)},
        text=True,
        check=True,
        timeout=60,
    )
    device.copy_out(host, address, 5000)
    device.synchronize()
    np.testing.assert_array_equal(host.array, np.arange(5000) % 250 + 1)
    with pytest.raises(DeviceError, match="hipIpcOpenMemHandle"):
        device.open_shared(device.share(address))  # HIP opens handles of other processes only


# Compiled kernels


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, open_hip: Open, tmp_path: Path) -> Callable[[], HipDevice]:
    """Opens devices that keep their images in an empty directory."""

    def opener() -> HipDevice:
        device = open_hip()
        monkeypatch.setenv("REDSHARD_CACHE", str(tmp_path / "cache"))
        return device

    return opener


def test_images_are_kept_and_damaged_ones_replaced(
    own_cache: Callable[[], HipDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(own_cache())
    (image,) = (tmp_path / "cache").iterdir()
    whole = image.read_bytes()

    def refuse(*arguments: object) -> bytes:
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr("redshard.worker.device.hip.HipDriver.compile", refuse)
        embed(own_cache())
    image.write_bytes(whole[:5000])
    device = own_cache()
    _, out = embed(device)
    assert fetch(device, out, 1)[0] == 224
    assert len(image.read_bytes()) > 5000
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [image.name]


def test_a_cache_that_cannot_be_written_does_no_harm(
    open_hip: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    device = open_hip()
    monkeypatch.setenv("REDSHARD_CACHE", str(tmp_path / "file" / "cache"))
    _, out = embed(device)
    assert fetch(device, out, 1)[0] == 224
    assert "compiled kernels are not kept" in caplog.text


def test_an_image_depends_on_source_options_and_target() -> None:
    root = sources.source_root()
    keys = {
        kernel_images.image_key(root, "rows.hip", ["-DA=1"], "gfx1100"),
        kernel_images.image_key(root, "rows.hip", ["-DA=2"], "gfx1100"),
        kernel_images.image_key(root, "rows.hip", ["-DA=1"], "gfx942"),
        kernel_images.image_key(root, "planes.hip", ["-DA=1"], "gfx1100"),
    }
    assert len(keys) == 4


def test_an_image_depends_on_every_header(tmp_path: Path) -> None:
    root, changed = sources.source_root(), tmp_path / "changed"
    shutil.copytree(root, tmp_path / "same")
    shutil.copytree(root, changed)
    (changed / "common" / "types.h").write_text("// nothing\n")
    key, same, other = (
        kernel_images.image_key(path, "rows.hip", [], "gfx1100")
        for path in (root, tmp_path / "same", changed)
    )
    assert key == same
    assert key != other


def test_what_the_compiler_says_is_in_the_error(
    open_hip: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sources.source_root(), tmp_path / "kernels")
    (tmp_path / "kernels" / "hip" / "rows.hip").write_text("int broken = nonsense;\n")
    monkeypatch.setattr(kernel_set, "source_root", lambda: tmp_path / "kernels")
    with pytest.raises(DeviceError, match=r"(?s)rows.hip does not compile for GPU 0 .*gfx1100.*nonsense"):
        embed(open_hip())


def test_workers_may_start_together(tmp_path: Path) -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_hip_device import *\nembed(HipDevice())"
    environment = os.environ | standin.environment() | {"PYTHONPATH": ":".join(sys.path)}
    environment["REDSHARD_CACHE"] = str(tmp_path)
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


# Misbehaviour


def test_a_launch_that_fails_later_is_reported_by_the_next_wait(open_hip: Open) -> None:
    device = open_hip(fail_launch=1)
    embed(device)
    with pytest.raises(DeviceError, match=r"hipStreamSynchronize.*hipErrorLaunchFailure.*dmesg"):
        device.synchronize()
    with pytest.raises(DeviceError, match="hipErrorLaunchFailure"):
        device.allocate(256)
    device.close()


def test_a_lost_device_is_reported_by_every_call(open_hip: Open) -> None:
    device = open_hip(lose_device=1)
    embed(device)
    with pytest.raises(DeviceError, match=r"hipErrorNoDevice.*the GPU is gone"):
        device.synchronize()
    with pytest.raises(DeviceError, match="hipErrorNoDevice"):
        device.memory_info()
    device.close()


def test_a_wait_past_its_deadline_ends_the_process() -> None:
    script = """
from redshard.worker.device.hip import HipDevice
from redshard.worker.device.watchdog import Watchdog
device = HipDevice()
with Watchdog(device).guard("allocating weights 1/1 (1.00 GiB)", 0.5):
    device.allocate(1 << 30)
"""
    process = run_python(script, hang_allocation=1)
    assert process.returncode == EXIT_HUNG
    for part in ("allocating weights 1/1", "hip device Stand-in GPU 0 (gfx1100)", "amdgpu.cwsr_enable=0"):
        assert part in process.stderr


# Choice of a device


def test_an_amd_gpu_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.activate(monkeypatch)
    for kind in ("auto", "hip"):
        device = open_device(kind)  # type: ignore[arg-type]
        assert device.kind == "hip"
        device.close()
    assert isinstance(open_device("cpu"), CpuDevice)


def test_a_runtime_without_gpus_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.activate(monkeypatch, devices=0)
    assert open_device("auto").kind != "hip"
    with pytest.raises(DeviceError, match="the runtime reports 0"):
        open_device("hip")
    with pytest.raises(DeviceError, match="no kind of device named 'gpu'"):
        open_device("gpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["auto", "hip"])
def test_rocr_visible_devices_alone_is_explained(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    standin.activate(monkeypatch)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    with pytest.raises(DeviceError, match=r"ROCR_VISIBLE_DEVICES=1 .* choose GPUs by HIP_VISIBLE_DEVICES"):
        open_device(kind)  # type: ignore[arg-type]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    open_device(kind).close()  # type: ignore[arg-type]


@pytest.mark.skipif(ctypes.util.find_library("amdhip64") is not None, reason="there is a HIP runtime")
def test_a_machine_without_a_runtime_is_told_so() -> None:
    script = """
from redshard.worker.device.choose import open_device
from redshard.worker.device.base import DeviceError
try:
    open_device("hip")
except DeviceError as error:
    print(error)
"""
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": os.environ["PATH"]}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.stdout.startswith("no HIP runtime: ")
    assert "libamdhip64.so" in process.stdout
