"""The CPU device: host memory and the native kernels of `redshard._cpu`; calls return when they are done."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path

import numpy as np

import redshard._cpu as _cpu
from redshard.worker.device.arguments import KERNEL_ARGUMENTS, CopyArguments, FillArguments
from redshard.worker.device.base import Device, DeviceError, DeviceProperties, Event, Graph, HostBuffer
from redshard.worker.device.cgroup import available_memory, cpu_limit, memory_limit

_ALIGNMENT = 4096


class CpuEvent(Event):
    """A point that has always passed."""

    def synchronize(self, deadline: float | None = None) -> None:
        """Return at once."""


class CpuGraph(Graph):
    """Operations recorded in native code."""

    def __init__(self, graph: _cpu.Graph) -> None:
        self._graph: _cpu.Graph | None = graph

    def replay(self) -> None:
        if self._graph is None:
            raise DeviceError("replay() of a graph that was released")
        try:
            self._graph.replay()
        except MemoryError:
            raise DeviceError("CPU device: no memory for the intermediate results of a step") from None

    def release(self) -> None:
        self._graph = None


class CpuDevice(Device):
    """The processors of the machine.

    Args:
        n_threads: threads that run kernels; by default one for each CPU that this process may use.
        isa: instruction set of the kernels: "auto" for the best that works here, or a name out of
            `redshard._cpu.features()`.

    Raises:
        DeviceError: a number of threads below 1, or an instruction set that does not work here.
    """

    kind = "cpu"
    queues_work = False

    def __init__(self, n_threads: int | None = None, isa: str = "auto") -> None:
        try:
            self._runtime = _cpu.Runtime(usable_cpus() if n_threads is None else n_threads, isa)
        except ValueError as error:
            raise DeviceError(f"CPU device: {error}") from None
        self.properties = DeviceProperties(
            name=_processor_name(),
            arch=self._runtime.isa,
            compute_units=self._runtime.n_threads,
            wave_size=1,
            lds_bytes=0,
            total_memory=self.memory_info()[1],
            features=frozenset(_cpu.features()),
        )
        self._allocations: set[int] = set()
        self._recording: list[tuple[str, bytes]] | None = None

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of main memory, or what is left of this process's share of it."""
        machine = _meminfo()
        free, total = machine["MemAvailable"], machine["MemTotal"]
        free_share, share = available_memory(), memory_limit()
        return (
            free if free_share is None else min(free, free_share),
            total if share is None else min(total, share),
        )

    def allocate(self, nbytes: int) -> int:
        free, _ = self.memory_info()
        # The system would promise more than it has, and kill the process when the memory is used.
        if nbytes < 0 or nbytes > free:
            raise DeviceError(f"allocate({nbytes}) on the CPU: {free} bytes are free")
        try:
            address: int = _cpu.allocate(nbytes, _ALIGNMENT)
        except MemoryError:
            raise DeviceError(f"allocate({nbytes}) on the CPU: refused, with {free} bytes free") from None
        self._allocations.add(address)
        return address

    def free(self, address: int) -> None:
        if address not in self._allocations:
            raise DeviceError(f"free({address:#x}) on the CPU: not an allocation of this device")
        self._allocations.remove(address)
        _cpu.free(address)

    def allocate_host(self, nbytes: int) -> HostBuffer:
        try:
            memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
        except (MemoryError, ValueError) as error:
            raise DeviceError(f"allocate_host({nbytes}) on the CPU: {error}") from None
        start = -memory.ctypes.data % _ALIGNMENT
        array = memory[start : start + nbytes]
        return HostBuffer(array.ctypes.data, array)

    def free_host(self, buffer: HostBuffer) -> None:
        """Nothing: the memory goes with the last reference to the buffer's array."""

    def copy_in(self, destination: int, source: HostBuffer, nbytes: int, offset: int = 0) -> None:
        _check_range("copy_in", source, nbytes, offset)
        self.copy(destination, source.address + offset, nbytes)

    def copy_out(self, destination: HostBuffer, source: int, nbytes: int, offset: int = 0) -> None:
        _check_range("copy_out", destination, nbytes, offset)
        self.copy(destination.address + offset, source, nbytes)

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        self._run("copy", CopyArguments(destination, source, nbytes))

    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        self._run("fill", FillArguments(destination, nbytes, byte))

    def record_event(self) -> Event:
        return CpuEvent()

    def synchronize(self, deadline: float | None = None) -> None:
        """Return at once: nothing is ever left to wait for."""

    def launch(self, kernel: str, arguments: ctypes.Structure, rows: int) -> None:
        if kernel not in KERNEL_ARGUMENTS:
            raise DeviceError(f"launch of unknown kernel {kernel!r}; known are {', '.join(KERNEL_ARGUMENTS)}")
        self._run(kernel, arguments)

    def scratch_bytes(
        self, rows: int, sequences: int, n_heads: int, value_dim: int, max_context: int, total_context: int
    ) -> int:
        return _cpu.attention_scratch_bytes(rows, n_heads, value_dim, max_context)

    def begin_recording(self) -> None:
        if self._recording is not None:
            raise DeviceError("begin_recording() while recording")
        self._recording = []

    def end_recording(self) -> Graph:
        if self._recording is None:
            raise DeviceError("end_recording() without begin_recording()")
        operations, self._recording = self._recording, None
        return CpuGraph(self._runtime.record(operations))

    def close(self) -> None:
        for address in list(self._allocations):
            self.free(address)

    def _run(self, operation: str, arguments: ctypes.Structure) -> None:
        """Run an operation or, while recording, check and record it."""
        block = bytes(arguments)
        try:
            if self._recording is None:
                self._runtime.launch(operation, block)
            else:
                _cpu.check(operation, block)
                self._recording.append((operation, block))
        except ValueError as error:
            raise DeviceError(f"CPU device: {error}") from None
        except MemoryError:
            raise DeviceError(f"CPU device: no memory for the intermediate results of {operation}") from None


def _check_range(call: str, buffer: HostBuffer, nbytes: int, offset: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > buffer.array.nbytes:
        raise DeviceError(
            f"{call} of {nbytes} bytes at offset {offset} of a host buffer of {buffer.array.nbytes} bytes"
        )


def usable_cpus() -> int:
    """CPUs this process may run on, or the whole CPUs' worth of time it is given, if that is less."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return n_cpus if limit is None else max(1, min(n_cpus, math.floor(limit)))


def _meminfo() -> dict[str, int]:
    """Bytes by field of /proc/meminfo."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise DeviceError(f"CPU device: cannot read how much memory there is: {error}") from None
    return {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
