"""A device in host memory that checks every address, defers every copy, and misbehaves when told to."""

from __future__ import annotations

import ctypes
import time
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from redshard.worker.device.base import Device, DeviceError, DeviceProperties, Event, Graph, HostBuffer

ALIGNMENT = 256
#: The rest of a larger allocation is not touched, so that it may be larger than this machine's memory.
_POISONED_BYTES = 16 << 20


class FakeDevice(Device):
    """A `Device` without kernels.

    Copies run only when somebody waits for them, so code that reuses a staging buffer too early is caught.
    Fresh memory is poisoned. An address outside a live allocation raises AssertionError, which no caller
    handles.

    Args:
        total_memory: bytes that may be allocated.
        refuse_view_reads: copies to the host from inside an allocation fail, as some runtimes do.
        corrupt_view_reads: or bring wrong bytes.
        failing_allocation: number (from 1) of the allocation that fails.
        hanging_call: "allocate", "synchronize" or "copy_in": never returns.

    Attributes:
        allocations: how many were made; live: bytes of those not freed, by address.
        host_buffers: pinned buffers not freed.
        largest_queue: most bytes of copies ever waiting.
    """

    kind = "cpu"

    def __init__(
        self,
        total_memory: int = 1 << 34,
        refuse_view_reads: bool = False,
        corrupt_view_reads: bool = False,
        failing_allocation: int = 0,
        hanging_call: str = "",
    ) -> None:
        self.properties = DeviceProperties("fake", "host", 1, 1, 0, total_memory, frozenset())
        self.refuse_view_reads = refuse_view_reads
        self.corrupt_view_reads = corrupt_view_reads
        self.failing_allocation = failing_allocation
        self.hanging_call = hanging_call
        self.allocations = 0
        self.live: dict[int, int] = {}
        self.host_buffers: dict[int, HostBuffer] = {}
        self.largest_queue = 0
        self._storage: dict[int, np.ndarray] = {}
        self._queue: list[tuple[int, Callable[[], object]]] = []
        self._passed = 0
        self._recording: list[tuple[int, Callable[[], object]]] | None = None

    def memory_info(self) -> tuple[int, int]:
        total = self.properties.total_memory
        return total - sum(self.live.values()), total

    def allocate(self, nbytes: int) -> int:
        self._may_hang("allocate")
        assert self._recording is None, "allocation while recording"
        self.allocations += 1
        if self.allocations == self.failing_allocation or nbytes > self.memory_info()[0]:
            raise DeviceError(f"allocate({nbytes}): out of memory")
        address, storage = _aligned_memory(nbytes)
        self._storage[address] = storage
        self.live[address] = nbytes
        return address

    def free(self, address: int) -> None:
        assert address in self.live, f"{address:#x} is not an allocation"
        assert not self._queue, "memory was freed under copies in flight"
        del self.live[address], self._storage[address]

    def allocate_host(self, nbytes: int) -> HostBuffer:
        address, array = _aligned_memory(nbytes)
        buffer = self.host_buffers[address] = HostBuffer(address, array)
        return buffer

    def free_host(self, buffer: HostBuffer) -> None:
        assert not self._queue, "staging memory was freed under copies in flight"
        del self.host_buffers[buffer.address]

    def copy_in(self, destination: int, source: HostBuffer, nbytes: int, offset: int = 0) -> None:
        self._may_hang("copy_in")
        self._allocation_of(destination, nbytes)
        assert 0 <= offset <= offset + nbytes <= source.array.nbytes
        self._enqueue(nbytes, lambda: _move(destination, source.address + offset, nbytes))

    def copy_out(self, destination: HostBuffer, source: int, nbytes: int, offset: int = 0) -> None:
        inside = self._allocation_of(source, nbytes) != source
        assert 0 <= offset <= offset + nbytes <= destination.array.nbytes
        if inside and self.refuse_view_reads:
            raise DeviceError(f"copy_out({nbytes}): hipErrorInvalidValue")
        if inside and self.corrupt_view_reads:
            self._enqueue(nbytes, lambda: destination.array[offset : offset + nbytes].fill(0))
        else:
            self._enqueue(nbytes, lambda: _move(destination.address + offset, source, nbytes))

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        self._allocation_of(source, nbytes)
        self._allocation_of(destination, nbytes)
        self._enqueue(nbytes, lambda: _move(destination, source, nbytes))

    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        self._allocation_of(destination, nbytes)
        self._enqueue(nbytes, lambda: ctypes.memset(destination, byte, nbytes))

    def record_event(self) -> Event:
        return _FakeEvent(self, self._passed + len(self._queue))

    def synchronize(self, deadline: float | None = None) -> None:
        self._may_hang("synchronize")
        self.run_until(self._passed + len(self._queue))

    def run_until(self, point: int) -> None:
        """Run the deferred copies up to the one numbered `point`."""
        while self._queue and self._passed < point:
            self._queue.pop(0)[1]()
            self._passed += 1

    def launch(self, kernel: str, arguments: ctypes.Structure, rows: int) -> None:
        raise DeviceError(f"{kernel}: the fake device has no kernels")

    def scratch_bytes(
        self, rows: int, sequences: int, n_heads: int, value_dim: int, max_context: int, total_context: int
    ) -> int:
        return ALIGNMENT

    def begin_recording(self) -> None:
        assert self._recording is None
        self._recording = []

    def end_recording(self) -> Graph:
        assert self._recording is not None
        graph = _FakeGraph(self, self._recording)
        self._recording = None
        return graph

    def close(self) -> None:
        self.synchronize()
        for address in list(self.live):
            self.free(address)
        for buffer in list(self.host_buffers.values()):
            self.free_host(buffer)

    def enqueue_all(self, calls: list[tuple[int, Callable[[], object]]]) -> None:
        """Put recorded copies behind what is queued."""
        for nbytes, call in calls:
            self._enqueue(nbytes, call)

    def _enqueue(self, nbytes: int, call: Callable[[], object]) -> None:
        if self._recording is not None:
            self._recording.append((nbytes, call))
            return
        self._queue.append((nbytes, call))
        self.largest_queue = max(self.largest_queue, sum(waiting for waiting, _ in self._queue))

    def _allocation_of(self, address: int, nbytes: int) -> int:
        bases = sorted(self.live)
        index = bisect_right(bases, address) - 1
        end = bases[index] + self.live[bases[index]] if index >= 0 else 0
        assert address + nbytes <= end, f"{nbytes} bytes at {address:#x} are not in a live allocation"
        return bases[index]

    def _may_hang(self, call: str) -> None:
        if call == self.hanging_call:
            time.sleep(3600)


class _FakeEvent(Event):
    def __init__(self, device: FakeDevice, point: int) -> None:
        self._device = device
        self._point = point

    def synchronize(self, deadline: float | None = None) -> None:
        self._device.run_until(self._point)


class _FakeGraph(Graph):
    def __init__(self, device: FakeDevice, calls: list[tuple[int, Callable[[], object]]]) -> None:
        self._device = device
        self._calls = calls

    def replay(self) -> None:
        self._device.enqueue_all(self._calls)

    def release(self) -> None:
        self._calls = []


def _aligned_memory(nbytes: int) -> tuple[int, np.ndarray]:
    storage = np.empty(nbytes + ALIGNMENT, np.uint8)
    storage[:_POISONED_BYTES] = 0xA5
    start = -storage.ctypes.data % ALIGNMENT
    array = storage[start : start + nbytes]
    return array.ctypes.data, array


def _move(destination: int, source: int, nbytes: int) -> None:
    ctypes.memmove(destination, source, nbytes)
