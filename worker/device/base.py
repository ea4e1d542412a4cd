"""The device contract: what a worker asks of a GPU or of the CPU, synchronous to read, asynchronous to run.

Addresses are plain integers in the device's memory. Every method may raise `DeviceError`. Calls on one stream
run in order; `synchronize` waits for them. One thread at a time drives a device.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from redshard.loader.gguf.quant_types import QuantType


class DeviceError(RuntimeError):
    """A device call failed: says which call, error and device, with the sizes, and a hint where known."""


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """What a device is. Sizes in bytes; ``wave_size`` is how many lanes run together (1 on the CPU)."""

    name: str
    arch: str
    compute_units: int
    wave_size: int
    lds_bytes: int
    total_memory: int
    features: frozenset[str]


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """Host memory the device can copy from asynchronously (pinned where the device knows pinning)."""

    address: int
    array: np.ndarray  # uint8, (nbytes,)


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks of a tensor, as its file has them.

    Attributes:
        quant_type: of the tensor; tensor_bytes: of the whole tensor.
        start: place of the run in the tensor; nbytes: of the run.
    """

    quant_type: QuantType
    tensor_bytes: int
    start: int
    nbytes: int


class Graph(ABC):
    """A recorded sequence of launches and copies, replayed in one call."""

    @abstractmethod
    def replay(self) -> None:
        """Run the sequence again, in order, behind what the stream already holds."""

    @abstractmethod
    def release(self) -> None:
        """Give back what the recording holds. Idempotent."""


class Event(ABC):
    """A point in the stream's work."""

    @abstractmethod
    def synchronize(self, deadline: float | None = None) -> None:
        """Wait until the stream has passed this point; `deadline` in seconds."""


class Device(ABC):
    """One device, driven by one worker."""

    kind: str  # "cpu", "hip" or "cuda"
    properties: DeviceProperties
    block_staging_bytes = 0  # device memory that `copy_in_blocks` passes blocks through
    queues_work = True  # launches, copies and replays return before they are done

    @abstractmethod
    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Address of a new allocation of `nbytes`, aligned to at least 256 bytes."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Give back an allocation."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> HostBuffer:
        """Pinned host memory for staging."""

    @abstractmethod
    def free_host(self, buffer: HostBuffer) -> None:
        """Give back staging memory."""

    @abstractmethod
    def copy_in(self, destination: int, source: HostBuffer, nbytes: int, offset: int = 0) -> None:
        """Copy `nbytes` at `offset` of a host buffer to device memory, asynchronously."""

    def copy_in_blocks(
        self, destination: int, source: HostBuffer, offset: int, run: BlockRun, staging: int
    ) -> None:
        """Copy a run of a tensor's blocks to where this device's kernels want them, asynchronously.

        Args:
            destination: address of the tensor.
            source: holds the run at `offset`.
            offset: in `source`.
            run: the blocks.
            staging: address of `block_staging_bytes` bytes of device memory for this call's own use.
        """
        self.copy_in(destination + run.start, source, run.nbytes, offset)

    @abstractmethod
    def copy_out(self, destination: HostBuffer, source: int, nbytes: int, offset: int = 0) -> None:
        """Copy `nbytes` of device memory into a host buffer at `offset`, asynchronously."""

    @abstractmethod
    def copy(self, destination: int, source: int, nbytes: int) -> None:
        """Copy within the device's memory, asynchronously."""

    @abstractmethod
    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        """Set `nbytes` of device memory to one byte value, asynchronously."""

    @abstractmethod
    def record_event(self) -> Event:
        """An event at the present end of the stream."""

    @abstractmethod
    def synchronize(self, deadline: float | None = None) -> None:
        """Wait for all work; past `deadline` seconds the process ends: driver calls cannot be cancelled."""

    @abstractmethod
    def launch(self, kernel: str, arguments: ctypes.Structure, rows: int) -> None:
        """Run one operation of `arguments.KERNEL_ARGUMENTS`; `rows` bounds the rows a step may have.

        A device may answer with several launches of its own kernels. The argument block is copied.
        """

    def row_buckets(self, max_rows: int) -> tuple[int, ...]:
        """Row counts worth a recorded graph of their own, ascending; the last is `max_rows`.

        A step replays the graph of the smallest count that holds its rows. One suffices where a kernel
        recorded for many rows costs no more on few; GPUs, where recording fixes the grid, have powers of two.
        """
        return (max_rows,)

    @abstractmethod
    def scratch_bytes(
        self, rows: int, sequences: int, n_heads: int, value_dim: int, max_context: int, total_context: int
    ) -> int:
        """Scratch that `attention` wants for steps of up to `rows` tokens of up to `sequences` sequences.

        `max_context` is how many positions a sequence may have, `total_context` all of a step together.
        """

    @abstractmethod
    def begin_recording(self) -> None:
        """From here on launches and copies are recorded instead of run."""

    @abstractmethod
    def end_recording(self) -> Graph:
        """The graph of what was recorded."""

    @abstractmethod
    def close(self) -> None:
        """Free everything the device still holds for this process. Idempotent."""

    @contextmanager
    def recording(self, graphs: list[Graph]) -> Iterator[None]:
        """Record the block's launches and append the graph to `graphs`, unless the block raises."""
        self.begin_recording()
        try:
            yield
        except BaseException:
            self.end_recording().release()
            raise
        graphs.append(self.end_recording())
