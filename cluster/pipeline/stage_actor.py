"""What runs in a stage's process: a worker that takes and gives messages.

It asks Ray for nothing but where it is, so stages also run without it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from redshard.cluster.pipeline.wire import decode_batch, decode_hidden, encode_hidden, encode_result
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import GPU_MAKERS, DeviceKind, GpuKind, gpu_count, open_device
from redshard.worker.device.cpu import usable_cpus
from redshard.worker.memory.packing import PoolError
from redshard.worker.model.handoff import HandoffType, Hidden, InboxOffer
from redshard.worker.model.stage import Launched
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_inputs import BatchError, StepLimits
from redshard.worker.model.weights import StagePart
from redshard.worker.worker import Worker, WorkerStats

#: Exit status of a process whose device failed in a step.
EXIT_DEVICE_FAILED = 88

LOG_FORMAT = "%(asctime)s %(levelname)s stage {stage} (pid {pid}): %(message)s"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What the plan needs to know of a stage's device. Memory in bytes; on CPUs it is the whole node's.

    Attributes:
        where: the GPU that Ray gave the stage, and the node.
        why_no_gpu: why that GPU could not be opened and "auto" took the CPU; "" otherwise.
    """

    name: str
    kind: str
    free_memory: int
    total_memory: int
    where: str
    why_no_gpu: str = ""


class StageActor:
    """One stage of the pipeline, as a Ray actor; `step` is what the compiled graph calls.

    Args:
        stage: its number.
        kind: of device; see `open_device`.
        n_neighbours: stages on the same node, this one included: they share its cores evenly.
        configuration: of the worker.
        log_level: a level of the logging module.

    Raises:
        DeviceError: the device cannot be opened.
    """

    def __init__(
        self,
        stage: int,
        kind: DeviceKind,
        n_neighbours: int,
        configuration: WorkerConfiguration,
        log_level: str = "WARNING",
    ) -> None:
        log_format = LOG_FORMAT.format(stage=stage, pid=os.getpid())
        logging.basicConfig(level=log_level, format=log_format, force=True)
        self._kind = kind
        self._progress = (0, 0)
        self._step_began: float | None = None
        self._launched: Launched | BatchError | None = None
        self._worker = Worker(open_device(kind, max(1, usable_cpus() // n_neighbours)), configuration)

    def report(self) -> DeviceReport:
        """The device, as it is now."""
        device = self._worker.device
        free, total = device.memory_info()
        why_no_gpu = _why_no_gpu() if self._kind == "auto" and device.kind == "cpu" else ""
        return DeviceReport(device.properties.name, device.kind, free, total, place_name(), why_no_gpu)

    def load(
        self,
        path: str,
        part: StagePart,
        limits: StepLimits,
        handoff: HandoffType = "float32",
        fingerprint: str | None = None,
    ) -> WorkerStats:
        """Load a part of a model; arguments and errors as for `Worker.load`."""
        return self._worker.load(
            path,
            part,
            limits,
            handoff=handoff,
            fingerprint=fingerprint,
            progress=self._note_progress,
        )

    def progress(self) -> tuple[int, int]:
        """(bytes uploaded, bytes in total); may be called while `load` runs. (0, 0) before it begins."""
        return self._progress

    def step(self, message: bytes, hidden: bytes = b"") -> bytes:
        """One step: `wire.encode_batch` in, on later stages with `wire.encode_hidden` of the stage before.

        Gives `wire.encode_hidden`, or on the last stage `wire.encode_result`. A worker that `runs_behind`
        launches a step and gives the result of the step before, so that its device never waits for the host;
        an empty message asks it for the last result. Others let an empty message through as it is.

        After most failures a runtime answers every call of the process with the same error, so a device that
        fails ends the process. Whoever watches it starts another, which loads the stage again.
        """
        self._step_began = time.monotonic()
        try:
            if not message and self._launched is None:
                return message
            if self.runs_behind:
                return self._step_behind(message)
            out = self.run(decode_batch(message), decode_hidden(hidden) if hidden else None)
        finally:
            self._step_began = None
        return encode_result(out) if isinstance(out, StepResult) else encode_hidden(out)

    def _step_behind(self, message: bytes) -> bytes:
        """Launch a step, if there is one, and wait for the one before, if there is one."""
        before, self._launched = self._launched, None
        stage = self._worker.stage
        with _failures_end_the_process():
            if message:
                try:
                    self._launched = stage.launch(decode_batch(message))
                except BatchError as refused:
                    self._launched = refused
            if isinstance(before, BatchError):
                raise before
            if before is None:
                return b""
            result = stage.finish(before)
        assert isinstance(result, StepResult)  # one stage is all there is
        return encode_result(result)

    def run(self, batch: StepBatch, hidden: Hidden | None = None) -> Hidden | StepResult:
        """One step; as `Stage.run`, except as for `step`."""
        with _failures_end_the_process():
            return self._worker.stage.run(batch, hidden)

    @property
    def runs_behind(self) -> bool:
        """Whether steps may overlap: the whole model is here, on a device that queues work."""
        part = self._worker.stage.part
        return part.is_first and part.is_last and self._worker.device.queues_work

    def step_seconds(self) -> float:
        """How long the present step has been running; 0 between steps. Answers while a step runs."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def open_inbox(self, n_slots: int) -> InboxOffer | None:
        """As `Handoff.open_inbox`; None where that is impossible."""
        try:
            return self._worker.stage.handoff.open_inbox(n_slots)
        except (DeviceError, PoolError) as error:
            logger.warning("hidden states come in through host memory: %s", error)
            return None

    def connect(self, offer: InboxOffer | None) -> bytes:
        """As `Handoff.connect`; nothing, and the way through host memory, where that is impossible.

        If the device is of no use after an attempt, the process ends, as in `step`.
        """
        handoff = self._worker.stage.handoff
        try:
            if offer is not None:
                return handoff.connect(offer)
            handoff.disconnect()
        except DeviceError as error:
            logger.warning("hidden states leave through host memory: %s", error)
            try:
                self._worker.device.synchronize()
            except DeviceError as lasting:
                _end_process(lasting)
        return b""

    def finds(self, probe: bytes) -> bool:
        """Whether what `connect` gave on the stage before has arrived; False for nothing."""
        return bool(probe) and self._worker.stage.handoff.finds(probe)

    def disconnect(self) -> None:
        """Send hidden states through host memory from now on."""
        self.connect(None)

    def memory_map(self) -> dict[str, Any]:
        """What is allocated on the device, as plain dicts, lists, numbers and strings."""
        return self._worker.memory_map().to_dict()

    def stats(self) -> dict[str, Any]:
        """The fields of `WorkerStats`, and the process id."""
        return asdict(self._worker.stats()) | {"pid": os.getpid()}

    def close(self) -> None:
        """Free everything on the device. Idempotent."""
        self._worker.close()

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)


@contextmanager
def _failures_end_the_process() -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        _end_process(error)


def _end_process(error: DeviceError) -> NoReturn:
    logger.critical("the device failed; ending the process: %s", error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(EXIT_DEVICE_FAILED)


def place_name() -> str:
    """The GPU that Ray gave this process, if it did, and the node."""
    import ray  # here alone: stages also run in processes without it

    node = f"node {ray.util.get_node_ip_address()}"
    gpus = ray.get_gpu_ids()
    return f"GPU {gpus[0]} of {node}" if gpus else node


def _why_no_gpu() -> str:
    return "; ".join(f"{maker}: {_why_none(kind)}" for kind, maker in GPU_MAKERS.items())


def _why_none(kind: GpuKind) -> str:
    try:
        return f"the runtime reports {gpu_count(kind)} GPUs"
    except DeviceError as error:
        return str(error)
