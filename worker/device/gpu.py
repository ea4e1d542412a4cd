"""What all GPUs have in common: a `Device` on top of the few calls in which runtimes differ.

A GPU has one stream. A recording is kept as a list of calls and captured into a graph when it ends, so that
nothing is compiled, loaded or allocated while the runtime captures.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from redshard.worker.device.base import (
    BlockRun,
    Device,
    DeviceError,
    DeviceProperties,
    Event,
    Graph,
    HostBuffer,
)
from redshard.worker.device.kernel_set import (
    PLANES,
    KernelSet,
    Launch,
    attention_scratch_bytes,
    launches,
    split_planes,
)
from redshard.worker.device.watchdog import Watchdog

logger = logging.getLogger(__name__)

Direction = Literal["in", "out", "within"]

# Which GPU a runtime's calls are about is a matter of the thread: `current` is the mark of its driver.
_thread = threading.local()


class Driver(ABC):
    """The calls of one runtime for one GPU. Each raises DeviceError with the call, its sizes and the reason.

    Addresses are integers; modules, functions, events and graphs are the runtime's own objects.

    Attributes:
        kind: "hip" or "cuda".
        hints: what to do about an error, by the error's name.
        properties: of the GPU; name: of the GPU, in messages.
        target: what `worker.kernel_set.Compiler` says.
    """

    kind: ClassVar[str]
    hints: ClassVar[Mapping[str, str]]
    properties: DeviceProperties
    name: str
    target: str

    def __init__(self) -> None:
        self._mark = object()

    def call(self, function: Callable[..., Any], *arguments: Any, what: str = "") -> Any:
        """Call a function of the runtime, from whichever thread.

        Args:
            function: returns a status, whose value is 0 for success, and results.
            arguments: of the function.
            what: the sizes and addresses among them, for the error's message.

        Returns:
            The result, or a tuple of them if there are not one.
        """
        if getattr(_thread, "current", None) is not self._mark:
            self._take_turn()
        try:
            error, *results = function(*arguments)
        except RuntimeError as reason:  # a library or a function is missing
            raise DeviceError(f"{function.__name__} on {self.name}: {reason}") from None
        if error.value:
            raise DeviceError(self._failure(function.__name__, what, error))
        return results[0] if len(results) == 1 else tuple(results)

    def _take_turn(self) -> None:
        """Make this GPU the calling thread's own; its calls until then were about another one."""
        _thread.current = self._mark  # first, because `make_current` calls
        try:
            self.make_current()
        except BaseException:
            _thread.current = None
            raise

    def _failure(self, call: str, what: str, error: Any) -> str:
        self.forget_error()
        message = f"{call}({what}) on {self.name}: {error.name} ({error.value})"
        if error.name in ("hipErrorOutOfMemory", "CUDA_ERROR_OUT_OF_MEMORY"):
            with suppress(DeviceError):
                free, total = self.memory_info()
                message += f"; {free} of {total} bytes are free"
        hint = self.hints.get(error.name)
        return f"{message}; {hint}" if hint else message

    def forget_error(self) -> None:  # noqa: B027  # only some runtimes need it
        """Keep later calls from reporting the last error again."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of runtime, driver and compiler, by their names: ``{"HIP runtime": "7.0.2", ...}``."""

    @abstractmethod
    def make_current(self) -> None:
        """Make this GPU the one that the calling thread's calls are about."""

    @abstractmethod
    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Device memory."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Give device memory back."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> int:
        """Pinned host memory."""

    @abstractmethod
    def free_host(self, address: int) -> None:
        """Give pinned host memory back."""

    @abstractmethod
    def copy(self, destination: int, source: int, nbytes: int, direction: Direction) -> None:
        """Copy on the stream."""

    @abstractmethod
    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        """Fill on the stream."""

    @abstractmethod
    def create_event(self) -> Any:
        """An event without timing."""

    @abstractmethod
    def record_event(self, event: Any) -> None:
        """Set an event at the end of the stream."""

    @abstractmethod
    def wait_event(self, event: Any) -> None:
        """Block until an event has passed."""

    @abstractmethod
    def destroy_event(self, event: Any) -> None:
        """Give an event back."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until the stream is empty."""

    @abstractmethod
    def begin_capture(self) -> None:
        """From here on the stream records."""

    @abstractmethod
    def end_capture(self) -> Any:
        """The recorded sequence, ready to be replayed."""

    @abstractmethod
    def replay(self, graph: Any) -> None:
        """Run a recorded sequence on the stream."""

    @abstractmethod
    def destroy_graph(self, graph: Any) -> None:
        """Give a recorded sequence back."""

    @abstractmethod
    def compile(self, source: Path, options: list[str]) -> bytes:
        """The image of a translation unit for this GPU."""

    @abstractmethod
    def load(self, image: bytes) -> Any:
        """A module with the kernels of an image."""

    @abstractmethod
    def function(self, module: Any, name: str) -> Any:
        """A kernel of a module."""

    @abstractmethod
    def launch(self, function: Any, launch: Launch, parameters: Any) -> None:
        """Launch on the stream; `parameters` is a ctypes array of the addresses of the parameters."""

    @abstractmethod
    def share(self, address: int) -> bytes:
        """A handle by which another process on this host can open an allocation."""

    @abstractmethod
    def open_shared(self, handle: bytes) -> int:
        """Address in this process of another process's allocation."""

    @abstractmethod
    def close_shared(self, address: int) -> None:
        """Let go of another process's allocation."""

    @abstractmethod
    def can_access(self, ordinal: int) -> bool:
        """Whether this GPU can read and write the memory of another that this process sees."""

    @abstractmethod
    def close(self) -> None:
        """Destroy the stream and what belongs to it."""


class GpuEvent(Event):
    """An event, handed back to its device for reuse when nobody holds it any more."""

    def __init__(self, device: GpuDevice, handle: Any) -> None:
        self._device, self._handle = device, handle

    def synchronize(self, deadline: float | None = None) -> None:
        with self._device.guard("waiting for an event", deadline):
            self._device.driver.wait_event(self._handle)

    def __del__(self) -> None:
        self._device.free_events.append(self._handle)


class GpuGraph(Graph):
    """A captured sequence of launches and copies."""

    def __init__(self, device: GpuDevice, handle: Any) -> None:
        self._device, self._handle = device, handle

    def replay(self) -> None:
        if self._handle is None:
            raise DeviceError("replay() of a graph that was released")
        self._device.driver.replay(self._handle)

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._device.forget_graph(self)
            self._device.driver.destroy_graph(handle)


class GpuDevice(Device):
    """A GPU behind a driver.

    Attributes:
        driver: the runtime's calls.
        free_events: handles of events that nobody waits for any more.
    """

    block_staging_bytes = 4 << 20

    def __init__(self, driver: Driver) -> None:
        self.kind = driver.kind
        self.properties = driver.properties
        self.driver = driver
        self.free_events: list[Any] = []
        self._kernels = KernelSet(driver)
        self._watchdog = Watchdog(self)
        self._allocations: set[int] = set()
        self._shared: set[int] = set()
        self._host_buffers: set[int] = set()
        self._graphs: set[GpuGraph] = set()
        self._recording: list[Callable[[], None] | Launch] | None = None
        self._closed = False

    def versions(self) -> dict[str, str]:
        """Versions of what drives the GPU, by its name."""
        return self.driver.versions()

    def prepare(self, wanted: Iterable[Launch]) -> None:
        """Compile and load what launches need, before they are due; errors as for `KernelSet.prepare`."""
        self._kernels.prepare(wanted)

    def has_compiled(self, launch: Launch) -> bool:
        """Whether the cache on disk has the kernel of a launch."""
        return self._kernels.is_cached(launch)

    def guard(self, what: str, deadline: float | None) -> Any:
        """Ends the process if the block takes longer than `deadline` seconds; None for no limit."""
        return nullcontext() if deadline is None else self._watchdog.guard(what, deadline)

    def memory_info(self) -> tuple[int, int]:
        return self.driver.memory_info()

    def allocate(self, nbytes: int) -> int:
        if nbytes < 1:
            raise DeviceError(f"allocate({nbytes}): at least one byte is needed")
        address = self.driver.allocate(nbytes)
        self._allocations.add(address)
        return address

    def free(self, address: int) -> None:
        if address not in self._allocations:
            raise DeviceError(f"free({address:#x}): not an allocation of this device")
        self._allocations.remove(address)
        self.driver.free(address)

    def allocate_host(self, nbytes: int) -> HostBuffer:
        if nbytes < 1:
            raise DeviceError(f"allocate_host({nbytes}): at least one byte is needed")
        address = self.driver.allocate_host(nbytes)
        self._host_buffers.add(address)
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        return HostBuffer(address, np.ctypeslib.as_array(memory))

    def free_host(self, buffer: HostBuffer) -> None:
        if buffer.address in self._host_buffers:
            self._host_buffers.remove(buffer.address)
            self.driver.free_host(buffer.address)

    def copy_in(self, destination: int, source: HostBuffer, nbytes: int, offset: int = 0) -> None:
        _check_range("copy_in", source, nbytes, offset)
        self._run(partial(self.driver.copy, destination, source.address + offset, nbytes, "in"))

    def copy_in_blocks(
        self, destination: int, source: HostBuffer, offset: int, run: BlockRun, staging: int
    ) -> None:
        if run.quant_type not in PLANES:
            super().copy_in_blocks(destination, source, offset, run, staging)
            return
        block_bytes = run.quant_type.block_bytes
        at_once = self.block_staging_bytes // block_bytes * block_bytes
        for done in range(0, run.nbytes, at_once):
            part = replace(run, start=run.start + done, nbytes=min(at_once, run.nbytes - done))
            self.copy_in(staging, source, part.nbytes, offset + done)
            self._run(split_planes(part, staging, destination))

    def copy_out(self, destination: HostBuffer, source: int, nbytes: int, offset: int = 0) -> None:
        _check_range("copy_out", destination, nbytes, offset)
        self._run(partial(self.driver.copy, destination.address + offset, source, nbytes, "out"))

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        self._run(partial(self.driver.copy, destination, source, nbytes, "within"))

    def fill(self, destination: int, byte: int, nbytes: int) -> None:
        self._run(partial(self.driver.fill, destination, byte, nbytes))

    def record_event(self) -> Event:
        handle = self.free_events.pop() if self.free_events else self.driver.create_event()
        self.driver.record_event(handle)
        return GpuEvent(self, handle)

    def synchronize(self, deadline: float | None = None) -> None:
        with self.guard("waiting for all work", deadline):
            self.driver.synchronize()

    def launch(self, kernel: str, arguments: ctypes.Structure, rows: int) -> None:
        own = type(arguments).from_buffer_copy(arguments)
        for launch in launches(kernel, own, rows, self.properties.wave_size):
            self._run(launch)

    def row_buckets(self, max_rows: int) -> tuple[int, ...]:
        """Powers of two: kernels for few rows are compiled for one count each, others fix their grid."""
        powers = [1 << i for i in range((max_rows - 1).bit_length())]
        return (*powers, max_rows)

    def scratch_bytes(
        self, rows: int, sequences: int, n_heads: int, value_dim: int, max_context: int, total_context: int
    ) -> int:
        return attention_scratch_bytes(rows, sequences, n_heads, value_dim, total_context)

    def begin_recording(self) -> None:
        if self._recording is not None:
            raise DeviceError("begin_recording() while recording")
        self._recording = []

    def end_recording(self) -> Graph:
        if self._recording is None:
            raise DeviceError("end_recording() without begin_recording()")
        calls, self._recording = self._recording, None
        self._kernels.prepare(call for call in calls if isinstance(call, Launch))
        self.driver.begin_capture()
        try:
            for call in calls:
                self._submit(call)
        except BaseException:
            with suppress(DeviceError):  # the first error says more
                self.driver.destroy_graph(self.driver.end_capture())
            raise
        graph = GpuGraph(self, self.driver.end_capture())
        self._graphs.add(graph)
        return graph

    def forget_graph(self, graph: GpuGraph) -> None:
        """A graph was released."""
        self._graphs.discard(graph)

    def share(self, address: int) -> bytes:
        """A handle by which another process on this host can open the allocation at `address`."""
        return self.driver.share(address)

    def open_shared(self, handle: bytes) -> int:
        """Address of an allocation that another process shares, until `close_shared`."""
        address = self.driver.open_shared(handle)
        self._shared.add(address)
        return address

    def close_shared(self, address: int) -> None:
        """Let go of an allocation of another process."""
        self._shared.remove(address)
        self.driver.close_shared(address)

    def can_access(self, ordinal: int) -> bool:
        """Whether this GPU reaches the memory of GPU number `ordinal` of this process directly."""
        return self.driver.can_access(ordinal)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        steps: list[Callable[[], object]] = [
            self.driver.synchronize,
            *(graph.release for graph in self._graphs),
            *(partial(self.close_shared, address) for address in self._shared),
            *(partial(self.free, address) for address in self._allocations),
            *(partial(self.driver.free_host, address) for address in self._host_buffers),
            *(partial(self.driver.destroy_event, event) for event in self.free_events),
            self.driver.close,
        ]
        self.free_events = []
        for step in steps:
            try:
                step()
            except DeviceError as error:
                # After a failure nothing can be freed but by the end of the process.
                logger.warning("closing %s: %s", self.properties.name, error)

    def _run(self, call: Callable[[], None] | Launch) -> None:
        """Put a call or a launch on the stream or, while recording, into the recording."""
        if self._recording is None:
            self._submit(call)
        else:
            self._recording.append(call)

    def _submit(self, call: Callable[[], None] | Launch) -> None:
        if not isinstance(call, Launch):
            call()
            return
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(call.arguments))
        self.driver.launch(self._kernels.function(call), call, parameters)


def _check_range(call: str, buffer: HostBuffer, nbytes: int, offset: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > buffer.array.nbytes:
        raise DeviceError(
            f"{call} of {nbytes} bytes at offset {offset} of a host buffer of {buffer.array.nbytes} bytes"
        )
