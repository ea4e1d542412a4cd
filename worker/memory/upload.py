"""Staged, gated upload: a stage's tensors from their files into the pool.

Bytes are read (not mapped: mapped pages would count as the worker's memory) into pinned staging buffers used
in turn, and copied to the device asynchronously, so that reading and copying overlap. Every `sync_bytes` the
host waits for the device, which bounds the work in flight on drivers that suffer from long queues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.units import format_bytes
from redshard.worker.configuration import UploadSettings
from redshard.worker.device.base import BlockRun, Event, HostBuffer
from redshard.worker.device.watchdog import Guard
from redshard.worker.memory.packing import align_up
from redshard.worker.memory.pool import MemoryPool, View

#: Called with (bytes handed to the device, total bytes).
Progress = Callable[[int, int], None]

#: Pieces start at multiples of this in a staging buffer, in bytes: copy engines are slower from odd
#: addresses.
_STAGING_ALIGNMENT = 256


class UploadError(RuntimeError):
    """Weights could not be read; the message names the file, the tensor and the bytes."""


class StoredTensor(Protocol):
    """Where a tensor's bytes lie; `loader.gguf_file.TensorInfo` is one."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def type(self) -> QuantType: ...


@dataclass(frozen=True, slots=True)
class _Piece:
    """Blocks of one tensor that pass through a staging buffer together."""

    tensor: StoredTensor
    address: int
    run: BlockRun
    staging_offset: int

    @property
    def nbytes(self) -> int:
        return self.run.nbytes

    @property
    def path(self) -> Path:
        return Path(self.tensor.path)

    @property
    def file_offset(self) -> int:
        return self.tensor.offset + self.run.start


def upload(
    pool: MemoryPool,
    tensors: Iterable[StoredTensor],
    views: Mapping[str, View],
    settings: UploadSettings | None = None,
    progress: Progress | None = None,
) -> int:
    """Copy each tensor's bytes into the view of its name; all have arrived when this returns.

    Args:
        pool: of the views.
        tensors: in any order; files are read front to back.
        views: by tensor name, of exactly the tensor's size.
        settings: staging buffers and gate.
        progress: called after every staging buffer.

    Returns:
        The bytes copied.

    Raises:
        UploadError: a file cannot be read or is too short, or a tensor has no view of its size.
        DeviceError: a copy failed.
    """
    settings = settings or UploadSettings()
    ordered = sorted(tensors, key=lambda tensor: (str(tensor.path), tensor.offset))
    _check_views(ordered, views)
    total = sum(tensor.nbytes for tensor in ordered)
    with ExitStack() as stack:
        staging = _Staging(pool, settings, stack)
        files = _Files(stack)
        done = 0
        batches = _batches(ordered, views, int(settings.staging_bytes))
        following = next(batches, None)
        while batch := following:
            following = next(batches, None)
            files.expect(following or [])
            staging.send(batch, files)
            done += sum(piece.nbytes for piece in batch)
            if progress:
                progress(done, total)
    return total


def _check_views(tensors: Sequence[StoredTensor], views: Mapping[str, View]) -> None:
    for tensor in tensors:
        view = views.get(tensor.name)
        if view is None:
            raise UploadError(f"no device memory is planned for tensor {tensor.name!r}")
        if view.nbytes != tensor.nbytes:
            raise UploadError(
                f"tensor {tensor.name!r} has {tensor.nbytes} bytes in {tensor.path}, "
                f"but {view.nbytes} on the device"
            )


def _batches(
    tensors: Sequence[StoredTensor], views: Mapping[str, View], staging_bytes: int
) -> Iterator[list[_Piece]]:
    """Cut the tensors into pieces and the pieces into what fills one staging buffer."""
    batch: list[_Piece] = []
    used = 0
    for tensor in tensors:
        address = views[tensor.name].address
        done = 0
        block_bytes = tensor.type.block_bytes
        while done < tensor.nbytes:
            room = max(0, staging_bytes - used) // block_bytes * block_bytes
            if not room:
                yield batch
                batch, used = [], 0
                continue
            nbytes = min(tensor.nbytes - done, room)
            batch.append(_Piece(tensor, address, BlockRun(tensor.type, tensor.nbytes, done, nbytes), used))
            done += nbytes
            used = align_up(used + nbytes, _STAGING_ALIGNMENT)
    if batch:
        yield batch


class _Staging:
    """Pinned host buffers used in turn; each waits for its last copies before it is filled again."""

    def __init__(self, pool: MemoryPool, settings: UploadSettings, stack: ExitStack) -> None:
        self._pool = pool
        self._sync_bytes = int(settings.sync_bytes)
        self._buffers: list[HostBuffer] = []
        self._events: list[Event | None] = [None] * settings.staging_buffers
        self._turn = 0
        self._in_flight = 0
        self._blocks = 0
        if nbytes := pool.device.block_staging_bytes:
            blocks = pool.allocate("upload", nbytes)
            self._blocks = blocks.address
            stack.callback(pool.free, blocks)
        stack.callback(self._release)  # waits, so it goes before the memory is freed
        for _ in range(settings.staging_buffers):
            self._buffers.append(pool.device.allocate_host(int(settings.staging_bytes)))

    def send(self, batch: Sequence[_Piece], files: _Files) -> None:
        """Read a batch and start its copies."""
        device = self._pool.device
        buffer, event = self._buffers[self._turn], self._events[self._turn]
        if event is not None:
            with self._guard(f"waiting for a staging buffer ({format_bytes(buffer.array.nbytes)})"):
                event.synchronize()
        for piece in batch:
            files.read(piece, buffer.array.data[piece.staging_offset : piece.staging_offset + piece.nbytes])
        with self._guard(
            f"copying tensor {batch[0].tensor.name!r} and {len(batch) - 1} more pieces to the device"
        ):
            for piece in batch:
                device.copy_in_blocks(piece.address, buffer, piece.staging_offset, piece.run, self._blocks)
            self._events[self._turn] = device.record_event()
        self._turn = (self._turn + 1) % len(self._buffers)
        self._in_flight += sum(piece.nbytes for piece in batch)
        if self._in_flight >= self._sync_bytes:
            self._gate()

    def _gate(self) -> None:
        with self._guard(f"waiting for an upload of {format_bytes(self._in_flight)}"):
            self._pool.device.synchronize()
        self._in_flight = 0

    def _release(self) -> None:
        try:
            self._gate()
        finally:
            for buffer in self._buffers:
                self._pool.device.free_host(buffer)

    def _guard(self, what: str) -> Guard:
        return self._pool.watchdog.guard(what, self._pool.deadlines.copy_s)


class _Files:
    """The files being read, each opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._descriptors: dict[Path, int] = {}

    def expect(self, batch: Sequence[_Piece]) -> None:
        """Have the system read a batch ahead."""
        for piece in batch:
            _advise(self._descriptor(piece.path), piece.file_offset, piece.nbytes, os.POSIX_FADV_WILLNEED)

    def read(self, piece: _Piece, target: memoryview) -> None:
        """Fill `target` with the piece's bytes."""
        descriptor = self._descriptor(piece.path)
        done = 0
        while done < piece.nbytes:
            try:
                count = os.preadv(descriptor, [target[done:]], piece.file_offset + done)
            except OSError as error:
                raise UploadError(
                    f"cannot read tensor {piece.tensor.name!r} from {piece.path}: {error}"
                ) from error
            if count == 0:
                raise UploadError(
                    f"{piece.path} is cut short: tensor {piece.tensor.name!r} needs bytes up to "
                    f"{piece.file_offset + piece.nbytes}, the file ends at {piece.file_offset + done}"
                )
            done += count

    def _descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise UploadError(f"cannot open {path}: {error.strerror}") from error
            self._stack.callback(os.close, descriptor)
            _advise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._descriptors[path] = descriptor
        return self._descriptors[path]


def _advise(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
    with suppress(OSError):  # only advice: some file systems know none
        os.posix_fadvise(descriptor, offset, nbytes, advice)
