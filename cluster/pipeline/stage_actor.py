"""What runs in a stage's process: a worker that takes and gives messages."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from redshard.cluster.pipeline.wire import decode_batch, decode_hidden, encode_hidden, encode_result
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import GPU_MAKERS, DeviceKind, GpuKind, gpu_count
from redshard.worker.device.cpu import usable_cpus
from redshard.worker.gpu_worker import GpuWorker
from redshard.worker.model.stage import Launched
from redshard.worker.model.step_batch import StepResult
from redshard.worker.model.step_inputs import BatchError


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


class StageActor(GpuWorker):
    """One stage of the pipeline, as a Ray actor; `step` is what the compiled graph calls.

    Args:
        stage: its number.
        kind: of device.
        n_neighbours: stages on the same node, this one included: they share its cores evenly.
        configuration: of the worker.
    """

    def __init__(
        self, stage: int, kind: DeviceKind, n_neighbours: int, configuration: WorkerConfiguration
    ) -> None:
        n_threads = max(1, usable_cpus() // n_neighbours)
        super().__init__(stage, kind, n_threads, configuration, log_level="WARNING")
        self._kind = kind
        self._step_began: float | None = None
        self._launched: Launched | BatchError | None = None

    def report(self) -> DeviceReport:
        """The device, as it is now."""
        device = self._worker.device
        free, total = device.memory_info()
        why_no_gpu = _why_no_gpu() if self._kind == "auto" and device.kind == "cpu" else ""
        return DeviceReport(device.properties.name, device.kind, free, total, place_name(), why_no_gpu)

    def stats(self) -> dict[str, Any]:
        """The fields of `WorkerStats`, and the process id."""
        return {**super().stats(), "pid": os.getpid()}

    def step(self, message: bytes, hidden: bytes = b"") -> bytes:
        """One step: `wire.encode_batch` in, on later stages with `wire.encode_hidden` of the stage before.

        Gives `wire.encode_hidden`, or on the last stage `wire.encode_result`. A worker that `runs_behind`
        launches a step and gives the result of the step before, so that its device never waits for the host;
        an empty message asks it for the last result. Others let an empty message through as it is.
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
        if message:
            try:
                self._launched = self.launch(decode_batch(message))
            except BatchError as refused:
                self._launched = refused
        if isinstance(before, BatchError):
            raise before
        if before is None:
            return b""
        result = self.finish(before)
        assert isinstance(result, StepResult)  # one stage is all there is
        return encode_result(result)

    def step_seconds(self) -> float:
        """How long the present step has been running; 0 between steps. Answers while a step runs."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began


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
