"""The Ray actor: a `Worker` whose answers can travel between processes.

A plain class; the cluster wraps it by ``ray.remote`` and pins it to its GPU. It does not import Ray.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import DeviceKind, open_device
from redshard.worker.memory.packing import PoolError
from redshard.worker.model.handoff import HandoffType, Hidden, InboxOffer
from redshard.worker.model.stage import Launched
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart
from redshard.worker.worker import Worker, WorkerStats

#: Exit status of a process whose device failed in a step.
EXIT_DEVICE_FAILED = 88

LOG_FORMAT = "%(asctime)s %(levelname)s stage {stage} (pid {pid}): %(message)s"


logger = logging.getLogger(__name__)


class GpuWorker:
    """One stage of a pipeline, in a process of its own.

    Args:
        stage: its number, for the log.
        kind: of device; see `open_device`.
        n_threads: of the CPU device.
        configuration: of the worker.
        log_level: a level of the logging module.

    Raises:
        DeviceError: the device cannot be opened.
    """

    def __init__(
        self,
        stage: int,
        kind: DeviceKind = "auto",
        n_threads: int | None = None,
        configuration: WorkerConfiguration | None = None,
        log_level: str = "INFO",
    ) -> None:
        logging.basicConfig(
            level=log_level, format=LOG_FORMAT.format(stage=stage, pid=os.getpid()), force=True
        )
        self._progress = (0, 0)
        self._worker = Worker(open_device(kind, n_threads), configuration)

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

    @property
    def runs_behind(self) -> bool:
        """As `Worker.runs_behind`."""
        return self._worker.runs_behind

    def run(self, batch: StepBatch, hidden: Hidden | None = None) -> Hidden | StepResult:
        """One step; as `Stage.run`, except that a device that fails ends the process.

        After most failures a runtime answers every call of the process with the same error. Whoever watches
        the process starts another, which loads the stage again.
        """
        with _failures_end_the_process():
            return self._worker.run(batch, hidden)

    def launch(self, batch: StepBatch) -> Launched:
        """Put one step on its way; as `Stage.launch`, except as for `run`."""
        with _failures_end_the_process():
            return self._worker.launch(batch)

    def finish(self, launched: Launched) -> Hidden | StepResult:
        """Wait for a step; as `Stage.finish`, except as for `run`."""
        with _failures_end_the_process():
            return self._worker.finish(launched)

    def open_inbox(self, n_slots: int) -> InboxOffer | None:
        """As `Handoff.open_inbox`; None where that is impossible."""
        try:
            return self._worker.handoff.open_inbox(n_slots)
        except (DeviceError, PoolError) as error:
            logger.warning("hidden states come in through host memory: %s", error)
            return None

    def connect(self, offer: InboxOffer | None) -> bytes:
        """As `Handoff.connect`; nothing, and the way through host memory, where that is impossible.

        If the device is of no use after an attempt, the process ends, as in `run`.
        """
        handoff = self._worker.handoff
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
        return bool(probe) and self._worker.handoff.finds(probe)

    def disconnect(self) -> None:
        """Send hidden states through host memory from now on."""
        self.connect(None)

    def memory_map(self) -> dict[str, Any]:
        """What is allocated on the device, as plain dicts, lists, numbers and strings."""
        return self._worker.memory_map().to_dict()

    def stats(self) -> dict[str, Any]:
        """The fields of `WorkerStats`."""
        return asdict(self._worker.stats())

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
