"""Device memory of a worker: few large allocations, views into them, and a way to read them back on any
driver.

Lifetimes. A `Buffer` is one device allocation; only the pool frees it. A `View` is a range of a buffer: it
owns nothing, keeps its buffer alive, and has no way to free anything. While views of a buffer exist, freeing
the buffer or closing the pool is refused with a `PoolError` that names them. Once a buffer is freed, asking
it or a view of it for an address raises `PoolError`, so no call reaches freed memory through the pool. The
end of a `with` block over a pool frees everything, and its views with it.
"""

from __future__ import annotations

import gc
import logging
import operator
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from redshard.loader.units import format_bytes
from redshard.worker.configuration import Deadlines, PoolSettings
from redshard.worker.device.base import Device, DeviceError, HostBuffer
from redshard.worker.device.watchdog import Watchdog
from redshard.worker.memory.packing import PackedTensor, PackingPlan, PoolError, align_up

__all__ = ["Buffer", "FreeRange", "MemoryMap", "MemoryPool", "PoolError", "SegmentMap", "View"]

#: Offsets of views are multiples of this unless asked otherwise: the width of the kernels' loads, in bytes.
VIEW_ALIGNMENT = 16
#: Alignment of the parts of a group, and what every device promises for an allocation.
GROUP_ALIGNMENT = 256

_TRANSFER_BYTES = 1 << 20
_PROBE_BYTES = 64 << 10
_ADDRESS_LIMIT = 1 << 63

logger = logging.getLogger(__name__)


class Buffer:
    """One device allocation, made and freed by a `MemoryPool`."""

    def __init__(self, name: str, address: int, nbytes: int, parts: tuple[PackedTensor, ...]) -> None:
        self.name = name
        self.nbytes = nbytes
        self.parts = parts
        self._address: int | None = address
        self._views: weakref.WeakSet[View] = weakref.WeakSet()

    @property
    def address(self) -> int:
        """Device address of the first byte. Raises PoolError once the buffer is freed."""
        if self._address is None:
            raise PoolError(f"{self.name!r} was freed")
        return self._address

    def view(self, offset: int, nbytes: int, name: str = "", alignment: int = VIEW_ALIGNMENT) -> View:
        """The range [offset, offset + nbytes).

        Args:
            offset: in bytes from the start of the buffer, a multiple of `alignment`.
            nbytes: at least 1.
            name: for messages; the buffer's name if empty.
            alignment: 1 for ranges that no kernel reads.

        Raises:
            PoolError: the range is negative, empty, misaligned or past the end, or the buffer was freed.
        """
        return View(self, offset, nbytes, name or self.name, alignment)

    def live_views(self) -> list[View]:
        """The views of this buffer that something still holds."""
        return list(self._views)


class View:
    """A borrowed range of a buffer."""

    __slots__ = ("__weakref__", "buffer", "name", "nbytes", "offset")

    def __init__(self, buffer: Buffer, offset: int, nbytes: int, name: str, alignment: int) -> None:
        start, size = _checked_range(name, offset, nbytes, buffer.nbytes, alignment)
        if (buffer.address + start) % alignment:
            raise PoolError(f"view {name!r} at offset {start} would not be aligned to {alignment} bytes")
        self.buffer = buffer
        self.offset = start
        self.nbytes = size
        self.name = name
        buffer._views.add(self)

    @property
    def address(self) -> int:
        """Device address of the first byte. Raises PoolError once the buffer is freed."""
        return self.buffer.address + self.offset

    def view(self, offset: int, nbytes: int, name: str = "", alignment: int = VIEW_ALIGNMENT) -> View:
        """A range of this view, of the same buffer; arguments and errors as for `Buffer.view`."""
        start, size = _checked_range(name or self.name, offset, nbytes, self.nbytes, alignment=1)
        return View(self.buffer, self.offset + start, size, name or self.name, alignment)


@dataclass(frozen=True, slots=True)
class FreeRange:
    """Bytes of a segment that hold nothing, too many to be padding."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SegmentMap:
    """One allocation: what lies in it, by ascending offset, and what is lost in it. Bytes."""

    name: str
    nbytes: int
    parts: tuple[PackedTensor, ...]
    padding: int
    free: tuple[FreeRange, ...]


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """A snapshot of a pool.

    Attributes:
        segments: live allocations, oldest first.
        allocated_bytes: their sum; peak_bytes: its highest value so far.
        allocations: allocations made so far; peak_allocations: the most alive at one time.
        readback: how views are read, and why.
    """

    segments: tuple[SegmentMap, ...]
    allocated_bytes: int
    peak_bytes: int
    allocations: int
    peak_allocations: int
    readback: str

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, numbers and strings, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line an allocation, then the totals."""
        lines = [
            f"{segment.name:<24} {format_bytes(segment.nbytes):>12}  {len(segment.parts):>4} parts  "
            f"{format_bytes(segment.padding)} padding  "
            f"{format_bytes(sum(free.nbytes for free in segment.free))} free"
            for segment in self.segments
        ]
        return "\n".join(
            [
                *lines,
                f"allocated {format_bytes(self.allocated_bytes)} (peak {format_bytes(self.peak_bytes)}) "
                f"in {self.allocations} allocations; readback {self.readback}",
            ]
        )


class MemoryPool:
    """All device memory of one worker. One thread at a time may use it, the one that drives the device.

    Attributes:
        readback: how views are read, "direct" or "bounce", and why.
    """

    def __init__(
        self, device: Device, settings: PoolSettings | None = None, deadlines: Deadlines | None = None
    ) -> None:
        self.device = device
        self.settings = settings or PoolSettings()
        self.deadlines = deadlines or Deadlines()
        self.watchdog = Watchdog(device)
        self._buffers: dict[str, Buffer] = {}
        self._closed = False
        self._allocations = self._peak_allocations = 0
        self._allocated_bytes = self._peak_bytes = 0
        self._transfer = device.allocate_host(_TRANSFER_BYTES)
        self._bounce: Buffer | None = None
        try:
            self.readback = self._choose_readback()
        except BaseException:
            self._revoke()
            raise

    # Allocation

    def allocate(self, name: str, nbytes: int) -> Buffer:
        """A buffer of its own.

        Raises:
            PoolError: the name is taken, `nbytes` is below one, the device has no room, or the pool is
                closed.
        """
        size = operator.index(nbytes)
        return self._allocate(name, size, (PackedTensor(name, 0, size),))

    def allocate_group(self, name: str, sizes: Mapping[str, int]) -> dict[str, View]:
        """Several named ranges in one allocation, in the order given, each aligned to 256 bytes.

        Raises:
            PoolError: as for `allocate`.
        """
        placements = []
        offset = 0
        for part, nbytes in sizes.items():
            if nbytes < 1:
                raise PoolError(f"{part!r} of {name!r} has {nbytes} bytes; at least one is needed")
            placements.append(PackedTensor(part, offset, nbytes))
            offset += align_up(nbytes, GROUP_ALIGNMENT)
        buffer = self._allocate(name, offset, tuple(placements))
        return _views_of_parts(buffer)

    def allocate_weights(self, plan: PackingPlan) -> dict[str, View]:
        """The segments of a plan; gives the view of every tensor by name.

        Raises:
            PoolError: the device has no room; then none of the plan's segments stays allocated.
        """
        buffers: list[Buffer] = []
        try:
            for number, segment in enumerate(plan.segments, start=1):
                name = f"weights {number}/{len(plan.segments)}"
                buffers.append(self._allocate(name, segment.nbytes, segment.placements))
        except BaseException:
            for buffer in buffers:
                with suppress(DeviceError):  # the first error says more
                    self._free(buffer)
            raise
        views: dict[str, View] = {}
        for buffer in buffers:
            views |= _views_of_parts(buffer)
        return views

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back to the device.

        Raises:
            PoolError: views of it are alive, or it is not one of this pool's.
        """
        self._check_open()
        self._check_ours(buffer)
        _check_unviewed([buffer])
        self._free(buffer)

    def close(self) -> None:
        """Wait for the device and free everything. Idempotent.

        Raises:
            PoolError: views are alive; then nothing is freed and the pool stays open.
            DeviceError: the device failed to wait or to free; everything was tried and the pool is closed.
        """
        if not self._closed:
            _check_unviewed(list(self._buffers.values()))
            self._revoke()

    def __enter__(self) -> MemoryPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Free everything; views that are alive become unusable."""
        if not self._closed:
            self._revoke()

    # Reading and writing

    def copy_out(self, destination: HostBuffer, view: View, offset: int = 0) -> None:
        """Copy a view into a host buffer at `offset`, asynchronously, in the way this driver can.

        Raises:
            PoolError: the view does not fit there, is not of this pool, or was freed.
        """
        self._check_open()
        self._check_ours(view.buffer)
        _checked_range(view.name, offset, view.nbytes, destination.array.nbytes, alignment=1)
        bounce = self._bounce
        if bounce is None or view.offset == 0:
            self.device.copy_out(destination, view.address, view.nbytes, offset)
            return
        for start in range(0, view.nbytes, bounce.nbytes):
            nbytes = min(bounce.nbytes, view.nbytes - start)
            self.device.copy(bounce.address, view.address + start, nbytes)
            self.device.copy_out(destination, bounce.address, nbytes, offset + start)

    def read(self, view: View) -> np.ndarray:
        """The bytes of a view, after all work on the stream: uint8, (view.nbytes,)."""
        self._check_open()
        result = np.empty(view.nbytes, np.uint8)
        transfer = self._transfer
        with self.watchdog.guard(f"reading {view.name!r} ({view.nbytes} bytes)", self.deadlines.copy_s):
            for start in range(0, view.nbytes, _TRANSFER_BYTES):
                piece = view.view(start, min(_TRANSFER_BYTES, view.nbytes - start), alignment=1)
                self.copy_out(transfer, piece)
                self.device.synchronize()
                result[start : start + piece.nbytes] = transfer.array[: piece.nbytes]
        return result

    def write(self, view: View, values: np.ndarray) -> None:
        """Copy an array's bytes into a view of the same size and wait for it.

        Raises:
            PoolError: the sizes differ, or the view is not of this pool or was freed.
        """
        self._check_open()
        self._check_ours(view.buffer)
        source = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if source.nbytes != view.nbytes:
            raise PoolError(f"cannot write {source.nbytes} bytes into {view.name!r} of {view.nbytes} bytes")
        transfer = self._transfer
        with self.watchdog.guard(f"writing {view.name!r} ({view.nbytes} bytes)", self.deadlines.copy_s):
            for start in range(0, view.nbytes, _TRANSFER_BYTES):
                piece = source[start : start + _TRANSFER_BYTES]
                transfer.array[: piece.nbytes] = piece
                self.device.copy_in(view.address + start, transfer, piece.nbytes)
                self.device.synchronize()

    def memory_map(self) -> MemoryMap:
        """What is allocated now; makes no device call."""
        return MemoryMap(
            tuple(self._segment_map(buffer) for buffer in list(self._buffers.values())),
            self._allocated_bytes,
            self._peak_bytes,
            self._allocations,
            self._peak_allocations,
            self.readback,
        )

    # Inside

    def _allocate(self, name: str, nbytes: int, parts: tuple[PackedTensor, ...]) -> Buffer:
        self._check_open()
        if name in self._buffers:
            raise PoolError(f"there is already an allocation named {name!r}")
        if not 1 <= nbytes < _ADDRESS_LIMIT:
            raise PoolError(f"cannot allocate {nbytes} bytes for {name!r}")
        what = f"allocating {name!r} ({format_bytes(nbytes)}, allocation {self._allocations + 1})"
        try:
            with self.watchdog.guard(what, self.deadlines.allocate_s):
                address = self.device.allocate(nbytes)
        except DeviceError as error:
            raise PoolError(f"{what} failed: {error}; {self._room()}") from error
        buffer = Buffer(name, address, nbytes, parts)
        self._buffers[name] = buffer
        self._allocations += 1
        self._allocated_bytes += nbytes
        self._peak_allocations = max(self._peak_allocations, len(self._buffers))
        self._peak_bytes = max(self._peak_bytes, self._allocated_bytes)
        return buffer

    def _room(self) -> str:
        held = f"this pool holds {format_bytes(self._allocated_bytes)} in {len(self._buffers)} allocations"
        try:
            free, total = self.device.memory_info()
        except DeviceError:
            return held
        return f"{held}, {format_bytes(free)} of {format_bytes(total)} are free"

    def _choose_readback(self) -> str:
        policy = self.settings.readback
        if policy == "direct":
            return "direct: configured"
        self._bounce = self.allocate("readback", _TRANSFER_BYTES)
        if policy != "probe":
            return "bounce: configured"
        with self.watchdog.guard(f"probing readback ({_PROBE_BYTES} bytes of a view)", self.deadlines.copy_s):
            failure = self._probe(self._bounce.address + self._bounce.nbytes - _PROBE_BYTES)
        if failure:
            logger.warning("%s cannot read views directly: %s", self.device.properties.name, failure)
            return f"bounce: {failure}"
        self._free(self._bounce)
        self._bounce = None
        return "direct: the probe succeeded"

    def _probe(self, address: int) -> str:
        """Copy from an address inside an allocation to the host; why that failed, or ""."""
        host = self._transfer
        pattern = np.random.default_rng().integers(0, 256, _PROBE_BYTES, np.uint8)
        host.array[:_PROBE_BYTES] = pattern
        self.device.copy_in(address, host, _PROBE_BYTES)
        self.device.synchronize()
        host.array[:_PROBE_BYTES] = ~pattern
        try:
            self.device.copy_out(host, address, _PROBE_BYTES)
            self.device.synchronize()
        except DeviceError as error:
            return str(error)
        return "" if np.array_equal(host.array[:_PROBE_BYTES], pattern) else "wrong bytes came back"

    def _free(self, buffer: Buffer) -> None:
        address = buffer.address
        buffer._address = None
        del self._buffers[buffer.name]
        self._allocated_bytes -= buffer.nbytes
        self.device.free(address)

    def _revoke(self) -> None:
        """Close, whatever views are alive; the first error is raised when everything was tried."""
        self._closed = True
        errors: list[DeviceError] = []
        steps: list[Callable[[], object]] = [
            self._wait,
            *(partial(self._free, buffer) for buffer in self._buffers.values()),
            partial(self.device.free_host, self._transfer),
        ]
        for step in steps:
            try:
                step()
            except DeviceError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _wait(self) -> None:
        with self.watchdog.guard("waiting for the device before freeing its memory", self.deadlines.copy_s):
            self.device.synchronize()

    def _check_open(self) -> None:
        if self._closed:
            raise PoolError("the memory pool is closed")

    def _check_ours(self, buffer: Buffer) -> None:
        if self._buffers.get(buffer.name) is not buffer:
            raise PoolError(f"{buffer.name!r} was freed or belongs to another pool")

    def _segment_map(self, buffer: Buffer) -> SegmentMap:
        padding = 0
        free = []
        end = 0
        for start, size in [*((part.offset, part.nbytes) for part in buffer.parts), (buffer.nbytes, 0)]:
            if start - end < self.settings.alignment:
                padding += start - end
            else:
                free.append(FreeRange(end, start - end))
            end = start + size
        return SegmentMap(buffer.name, buffer.nbytes, buffer.parts, padding, tuple(free))


def _views_of_parts(buffer: Buffer) -> dict[str, View]:
    return {part.name: buffer.view(part.offset, part.nbytes, part.name) for part in buffer.parts}


def _checked_range(name: str, offset: int, nbytes: int, limit: int, alignment: int) -> tuple[int, int]:
    """`offset` and `nbytes` as plain integers, if they are a range within `limit` bytes. Raises PoolError."""
    try:
        start, size = operator.index(offset), operator.index(nbytes)
    except TypeError:
        raise PoolError(f"{name!r}: offset {offset!r} and size {nbytes!r} must be integers") from None
    if start < 0 or size < 1:
        raise PoolError(f"{name!r}: offset {start} must not be negative and size {size} must be at least 1")
    if start + size > limit:
        raise PoolError(f"{name!r}: bytes {start} to {start + size} are past the end, {limit}")
    if start % alignment:
        raise PoolError(f"{name!r}: offset {start} is not a multiple of {alignment}")
    return start, size


def _check_unviewed(buffers: list[Buffer]) -> None:
    if any(buffer.live_views() for buffer in buffers):
        gc.collect()  # views in unreachable cycles are nobody's
    names = [view.name for buffer in buffers for view in buffer.live_views()]
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise PoolError(f"cannot free device memory: {len(names)} views of it are in use ({shown})")
