"""Stages in processes of their own, each tied to the next by a pipe: a pipeline of steps without Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from support.stage_process import StageProcess, connect

from redshard.cluster.pipeline.stage_actor import StageActor
from redshard.cluster.pipeline.wire import decode_hidden, decode_result, encode_batch, encode_hidden
from redshard.worker.configuration import Deadlines, WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.gpu import GpuDevice
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart

CONFIGURATION = WorkerConfiguration(deadlines=Deadlines(allocate_s=20, copy_s=20, step_s=20))


class LinkedStage(StageActor):
    """A stage that takes messages from the pipe before it and puts them into the one behind it."""

    def __init__(self, stage: int, kind: Any, inbound: Connection, outbound: Connection) -> None:
        super().__init__(stage, kind, 2, CONFIGURATION)
        self._inbound, self._outbound = inbound, outbound

    def serve(self, n_steps: int) -> None:
        """Run so many steps as their messages come."""
        for _ in range(n_steps):
            batch, *hidden = self._inbound.recv()
            out = self.step(batch, *hidden) or self.step(b"")  # a stage alone runs one step behind
            self._outbound.send((batch, out))

    def reaches(self) -> str:
        """The device, and whether it reaches its neighbour's memory."""
        device = self._worker.device
        if not isinstance(device, GpuDevice):
            return device.properties.name
        try:
            return f"{device.properties.name}; peer access to the next: {device.can_access(1)}"
        except DeviceError as error:
            return f"{device.properties.name}; {error}"

    def send_rows(self, batch: StepBatch, repeats: int) -> list[tuple[float, float]]:
        """Hand the rows of a step over, as after its layers: when each began and when it had been waited for.

        Times are those of a clock that the processes of a host share, in seconds.
        """
        times = []
        for _ in range(repeats):
            self._outbound.recv_bytes()  # the receiver waits
            began = time.perf_counter()
            hidden = self._worker.stage.handoff.send(len(batch.token_ids))
            waited = time.perf_counter()
            self._outbound.send_bytes(encode_hidden(hidden))
            times.append((began, waited))
        return times

    def take_rows(self, n_tokens: int, repeats: int) -> list[tuple[float, float]]:
        """Take over what `send_rows` sends: when each message arrived, and when its rows were in place."""
        times = []
        for _ in range(repeats):
            self._inbound.send_bytes(b"ready")
            message = self._inbound.recv_bytes()
            arrived = time.perf_counter()
            self._worker.stage.handoff.take(decode_hidden(message), n_tokens)
            self._worker.device.synchronize()
            times.append((arrived, time.perf_counter()))
        return times


class Chain:
    """The processes of a pipeline, and both ends of it. Whatever is waited for may last until the deadline.

    Args:
        kind: of device.
        environments: of each process.
        ends: the deadline, of the monotonic clock.
    """

    def __init__(self, kind: str, environments: Sequence[dict[str, str]], ends: float) -> None:
        self._ends = ends
        self._serving: list[StageProcess] = []
        context = get_context("spawn")
        links = [context.Pipe() for _ in range(len(environments) + 1)]
        self._source, self._sink = links[0][0], links[-1][1]
        self.stages: list[StageProcess] = []
        for stage, environment in enumerate(environments):
            make = partial(LinkedStage, stage, kind, links[stage][1], links[stage + 1][0])
            self.stages.append(StageProcess(make, environment))
        for before, behind in pairwise(links):  # the processes have them now
            before[1].close()
            behind[0].close()

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.1, self._ends - time.monotonic())

    def load(self, model: Path, parts: Sequence[StagePart], limits: StepLimits) -> None:
        """Begin to load a part of a model on each stage."""
        for stage, part in zip(self.stages, parts, strict=True):
            stage.ask("load", str(model), part, limits)

    def loaded(self) -> None:
        """Wait until all stages are loaded."""
        for stage in self.stages:
            stage.answer(self.left())

    def reaches(self) -> list[str]:
        """As `LinkedStage.reaches`, of each stage."""
        return [stage.call("reaches", timeout=self.left()) for stage in self.stages]

    def connect(self, way: str, n_slots: int) -> None:
        """Hand over by "host memory" or "device memory". Raises RuntimeError where that does not work."""
        first, last = self.stages
        if way == "host memory":
            first.call("disconnect", timeout=self.left())
        elif not connect(first, last, n_slots, timeout=self.left()):
            raise RuntimeError("the GPUs do not reach each other's memory; the warnings above say why")
        sends_by = first.call("stats", timeout=self.left())["sends_by"]
        assert sends_by == way, sends_by

    def begin(self, n_steps: int) -> None:
        """Let the stages run so many steps."""
        for stage in self.stages:
            stage.ask("serve", n_steps)
        self._serving = list(self.stages)

    def submit(self, batch: StepBatch) -> None:
        """Send a step to the first stage."""
        self._source.send((encode_batch(batch),))

    def collect(self) -> StepResult:
        """The oldest step's result. Raises what a stage raised, or TimeoutError."""
        while not self._sink.poll():
            answers = {stage.calls: stage for stage in self._serving}
            ready = connection.wait([self._sink, *answers], self.left())
            if not ready:
                raise TimeoutError("no result before the deadline")
            for stage in [answers[one] for one in ready if one is not self._sink]:
                self._serving.remove(stage)
                stage.answer(self.left())
        return decode_result(self._sink.recv()[1])

    def end(self) -> None:
        """Wait until the stages have run all steps."""
        for stage in self._serving:
            stage.answer(self.left())
        self._serving = []

    def close(self) -> None:
        """End the processes."""
        for stage in self.stages:
            stage.close()
