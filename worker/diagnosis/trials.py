"""What works on the GPUs of this machine, and what does not.

A driver call that hangs cannot be cancelled, so GPUs are counted and examined in processes of their own. Such
a process tells each check before it begins, and then what it found; it is ended when one takes too long.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import (
    AttentionArguments,
    EmbedArguments,
    MatmulArguments,
    Matrix,
    RopeStoreArguments,
    SampleArguments,
    SetTablesArguments,
)
from redshard.worker.device.bandwidth import host_read_bandwidth
from redshard.worker.device.base import BlockRun, DeviceError
from redshard.worker.device.choose import GPU_MAKERS, GpuKind, gpu_count, open_gpu
from redshard.worker.device.cpu import CpuDevice
from redshard.worker.device.gpu import GpuDevice
from redshard.worker.device.kernel_set import PLANES, Launch, launches, split_planes
from redshard.worker.memory.pool import MemoryPool

#: Seconds that a check may take; the longest is compiling a kernel.
DEADLINE_S = 60.0

_START_S = 60.0  # until a process tells its first check
_COPY_BYTES, _COPIES, _TRIES = 256 << 20, 4, 5
_BLOCKS = 4096
_LAST_WORDS_CHARACTERS = 300

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        found: plain values by name; empty if the check failed.
        failure: why, in one line; empty if it did not fail.
        answered: False if the process hung or ended instead of answering.
    """

    name: str
    found: Found
    failure: str = ""
    answered: bool = True


@dataclass(frozen=True, slots=True)
class GpuDiagnosis:
    """One GPU: its number among those that the runtime of its kind offers, and what was found, in order."""

    kind: GpuKind
    ordinal: int
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.failure]

    @property
    def arch(self) -> str:
        """Such as "gfx1100"; empty if the GPU could not be opened."""
        return str(next((check.found["arch"] for check in self.checks if "arch" in check.found), ""))


def count_gpus(deadline_s: float = DEADLINE_S) -> dict[GpuKind, Check]:
    """How many GPUs there are of each kind ("count"), or why that cannot be told."""
    return {kind: _run(f"count:{kind}", deadline_s)[-1] for kind in GPU_MAKERS}


def examine_gpu(kind: GpuKind, ordinal: int, deadline_s: float = DEADLINE_S) -> GpuDiagnosis:
    """Try everything that a worker will ask of a GPU.

    Checks: device (properties), versions, memory, readback, bandwidth, a kernel of each source, kernel
    result, peers. One that fails does not keep the others from being tried, unless it hangs or ends the
    process.

    Args:
        kind: of GPU.
        ordinal: its number among those of its kind that this process may see.
        deadline_s: seconds that each check may take.
    """
    return GpuDiagnosis(kind, ordinal, _run(f"examine:{kind}:{ordinal}", deadline_s))


def examine_cpu() -> Found:
    """Properties of the CPU device, its free memory, and how fast its threads read: "read_gb_per_s"."""
    device = CpuDevice()
    free, _ = device.memory_info()
    bandwidth = host_read_bandwidth(device.properties.compute_units)
    return _properties(device) | {"free_memory": free, "read_gb_per_s": bandwidth / 1e9}


# The process that asks


def _run(task: str, deadline_s: float) -> tuple[Check, ...]:
    """What `main(task)` finds in a process of its own; a failure comes last if it did not get to the end."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main({task!r})"
    checks: list[Check] = []
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr)
        try:
            lines: queue.Queue[bytes] = queue.Queue()
            threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
            doing, limit_s = "start", _START_S
            while line := lines.get(timeout=limit_s):
                message = json.loads(line)
                doing, limit_s = message["name"], deadline_s
                if "found" in message:
                    checks.append(Check(**message))
                    doing = "end"
            if process.wait(limit_s):
                checks.append(Check(doing, {}, _last_words(process.returncode, stderr), answered=False))
        except (queue.Empty, subprocess.TimeoutExpired):
            checks.append(Check(doing, {}, f"no answer within {limit_s:g} s", answered=False))
        finally:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # in a driver call it may survive even that
                process.wait(5)
    return tuple(checks)


def _forward(stream: IO[bytes], lines: queue.Queue[bytes]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(b"")


def _last_words(status: int, stderr: IO[bytes]) -> str:
    how = f"status {status}" if status > 0 else signal.Signals(-status).name
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    said = f": {lines[-1][:_LAST_WORDS_CHARACTERS]}" if lines else ""
    return f"the process ended with {how}{said}"


# The process that is asked


def main(task: str) -> None:
    """Do a task and write a line of JSON for each message: "count:KIND" or "examine:KIND:ORDINAL"."""
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a runtime prints must not get between the lines
    name, kind, *ordinal = task.split(":")
    gpu_kind: GpuKind = "hip" if kind == "hip" else "cuda"
    checks = _counting(gpu_kind) if name == "count" else _examining(gpu_kind, int(ordinal[0]))
    for check, look in checks:
        print(json.dumps({"name": check}), file=tell)
        try:
            answer = Check(check, look())
        except Exception as error:  # whatever it is, the other checks are of use
            answer = Check(check, {}, _one_line(error))
        print(json.dumps(asdict(answer)), file=tell)


def _one_line(error: Exception) -> str:
    """The first line, and of a compiler's log the first error."""
    text = str(error) if isinstance(error, DeviceError) else f"{type(error).__name__}: {error}"
    first, *rest = text.splitlines() or [""]
    complaint = next((line.strip() for line in rest if "error" in line), "")
    return f"{first}: {complaint}" if complaint else first


def _counting(kind: GpuKind) -> Iterator[tuple[str, Callable[[], Found]]]:
    yield "count", lambda: {"count": gpu_count(kind)}


def _examining(kind: GpuKind, ordinal: int) -> Iterator[tuple[str, Callable[[], Found]]]:
    opened: list[GpuDevice] = []

    def open_it() -> Found:
        opened.append(open_gpu(kind, ordinal))
        return _properties(opened[0])

    yield "device", open_it
    if not opened:
        return
    (device,) = opened
    yield "versions", device.versions
    yield "memory", partial(_memory, device)
    yield "readback", partial(_readback, device)
    yield "bandwidth", partial(_bandwidth, device)
    for source, launch in representative_launches(device.properties.wave_size).items():
        yield f"kernel {source}", partial(_compile, device, launch)
    yield "kernel result", partial(_check_kernel_result, device)
    yield "peers", partial(_peers, device, ordinal)
    device.close()


def _properties(device: GpuDevice | CpuDevice) -> Found:
    return asdict(device.properties) | {"features": sorted(device.properties.features)}


def _memory(device: GpuDevice) -> Found:
    free, total = device.memory_info()
    return {"free": free, "total": total}


def _readback(device: GpuDevice) -> Found:
    with MemoryPool(device) as pool:
        way, _, reason = pool.readback.partition(": ")
        return {"way": way, "reason": reason}


def _bandwidth(device: GpuDevice) -> Found:
    """Medians, in GB/s; a copy within the device counts its bytes twice, read and written."""
    nbytes = min(_COPY_BYTES, device.memory_info()[0] // 4)
    source, destination = device.allocate(nbytes), device.allocate(nbytes)
    host = device.allocate_host(nbytes)
    host.array[:] = 1  # pages that were never written may not exist
    try:
        return {
            "nbytes": nbytes,
            "to_device": _rate(device, nbytes, lambda: device.copy_in(source, host, nbytes)),
            "within_device": _rate(device, 2 * nbytes, lambda: device.copy(destination, source, nbytes)),
            "to_host": _rate(device, nbytes, lambda: device.copy_out(host, destination, nbytes)),
        }
    finally:
        device.free(source)
        device.free(destination)
        device.free_host(host)


def _rate(device: GpuDevice, nbytes: int, copy: Callable[[], None]) -> float:
    rates = []
    for _ in range(1 + _TRIES):
        start = time.perf_counter()
        for _ in range(_COPIES):
            copy()
        device.synchronize()
        rates.append(_COPIES * nbytes / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates[1:])


def representative_launches(wave_size: int) -> dict[str, Launch]:
    """A launch of each source in kernels/hip, with the types and sizes of a common model. Not to be run."""
    weights = Matrix(type=QuantType.Q8_0.ggml_id, n_rows=4096)
    matmul = MatmulArguments(w=(weights, weights, weights), n_matrices=1, width=4096)
    floats = Matrix(type=QuantType.F16.ggml_id, n_rows=4096)
    matmul_floats = MatmulArguments(w=(floats, floats, floats), n_matrices=1, width=4096)
    heads = {"n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "value_dim": 128, "block_size": 16}
    planned = [
        split_planes(_blocks(1), 0, 0),
        *launches("set_tables", SetTablesArguments(), 1, wave_size),
        *launches("embed", EmbedArguments(table=weights), 1, wave_size),
        *launches("matmul", matmul, 1, wave_size),
        *launches("matmul", matmul, 64, wave_size),
        *launches("matmul", matmul_floats, 64, wave_size),
        *launches("rope_store", RopeStoreArguments(**heads), 1, wave_size),
        *launches("attention", AttentionArguments(**heads, table_width=64, max_sequences=1), 1, wave_size),
        *launches("sample", SampleArguments(), 1, wave_size),
    ]
    return {launch.source: launch for launch in planned}


def _compile(device: GpuDevice, launch: Launch) -> Found:
    """Seconds until a kernel is loaded, and whether that was from the cache of compiled kernels."""
    cached = device.has_compiled(launch)
    start = time.perf_counter()
    device.prepare([launch])
    return {"seconds": time.perf_counter() - start, "cached": cached}


def _blocks(count: int) -> BlockRun:
    nbytes = count * QuantType.Q8_0.block_bytes
    return BlockRun(QuantType.Q8_0, tensor_bytes=nbytes, start=0, nbytes=nbytes)


def _check_kernel_result(device: GpuDevice) -> Found:
    """Let the kernel that splits blocks into planes run on random bytes, and compare."""
    run = _blocks(_BLOCKS)
    blocks = np.random.default_rng().integers(0, 256, (_BLOCKS, run.quant_type.block_bytes), np.uint8)
    planes = [blocks[:, start : start + size].ravel() for start, size in PLANES[run.quant_type]]
    host, address = device.allocate_host(run.nbytes), device.allocate(run.nbytes)
    staging = device.allocate(device.block_staging_bytes)
    host.array[:] = blocks.ravel()
    device.copy_in_blocks(address, host, 0, run, staging)
    device.copy_out(host, address, run.nbytes)
    device.synchronize()
    if not np.array_equal(host.array, np.concatenate(planes)):
        raise DeviceError("a kernel wrote wrong bytes")
    return {"right": True}


def _peers(device: GpuDevice, ordinal: int) -> Found:
    """Whether this GPU reaches the memory of each other one, by its number."""
    count = gpu_count("hip" if device.kind == "hip" else "cuda")
    return {str(other): device.can_access(other) for other in range(count) if other != ordinal}
