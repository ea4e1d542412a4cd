"""The actors of one pipeline: placed, started, loaded, and replaced when they die."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray

from redshard.cluster.engine.engine import StepLost
from redshard.cluster.errors import ModelError, PipelineError
from redshard.cluster.pipeline.placement import Placement
from redshard.cluster.pipeline.ray_errors import reason
from redshard.cluster.pipeline.stage_actor import DeviceReport, StageActor
from redshard.cluster.pipeline.stage_graph import StageGraph
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import DeviceKind
from redshard.worker.memory.packing import PoolError
from redshard.worker.model.handoff import HandoffType
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart
from redshard.worker.worker import WorkerStats

logger = logging.getLogger(__name__)

_REPORT_S = 60.0
#: A stage that does not answer for this long after a loss is lost too.
_ANSWER_S = 5.0
#: How often the progress of stages that load is looked at.
_LOOK_S = 1.0
#: Times that stages are started before the pipeline is given up.
_MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What the stages load: parts[i] of the model on stage i, for steps within `limits`.

    `fingerprint` is that of the model when it was planned: a stage that is loaded again takes no other.
    """

    path: str
    fingerprint: str
    parts: tuple[StagePart, ...]
    limits: StepLimits
    handoff: HandoffType


class _StagesLost(Exception):
    """Workers must be replaced: those of `stages`; the message says what happened to the last of them."""

    def __init__(self, stages: Iterable[int], why: str) -> None:
        super().__init__(why)
        self.stages = sorted(stages)


class WorkerGroup:
    """One `StageActor` for each stage, each in its place, and their pipeline.

    Args:
        n_stages: actors.
        kind: of device; "cpu" takes no GPU.
        configuration: of the workers.
        actor_class: `StageActor`, or what stands in for it in tests.

    Raises:
        PipelineError: the cluster has no room, or a device cannot be opened.
    """

    def __init__(
        self,
        n_stages: int,
        kind: DeviceKind,
        configuration: WorkerConfiguration,
        actor_class: type[StageActor] = StageActor,
    ) -> None:
        self._kind, self._configuration = kind, configuration
        self._actor_class: Any = ray.remote(actor_class)
        self._order: LoadOrder | None = None
        self._graph: StageGraph | None = None
        self._through_host: set[int] = set()
        self._progress = [(0, 0)] * n_stages
        self._reports: dict[int, DeviceReport] = {}
        self._loaded: dict[int, WorkerStats] = {}
        self._placement = Placement(n_stages, on_gpus=kind != "cpu")
        self._n_neighbours = [self._placement.n_neighbours(stage) for stage in range(n_stages)]
        self._actors = [self._start(stage) for stage in range(n_stages)]
        try:
            self._bring_up()
        except PipelineError:
            self.close()
            raise

    @property
    def n_stages(self) -> int:
        """How many stages there are."""
        return len(self._actors)

    @property
    def reports(self) -> list[DeviceReport]:
        """What each stage's first worker told of its device."""
        return [self._reports[stage] for stage in range(self.n_stages)]

    def stage_memory(self) -> list[int]:
        """Free bytes for each stage; stages on one node's CPUs share its memory."""
        return [
            report.free_memory // (neighbours if report.kind == "cpu" else 1)
            for report, neighbours in zip(self.reports, self._n_neighbours, strict=True)
        ]

    def load(self, order: LoadOrder, max_in_flight: int) -> list[WorkerStats]:
        """Load all stages at once, then connect them. Workers that fail are replaced, as in `restore`.

        Raises:
            ModelError: a stage cannot load its part, whatever the device.
            PipelineError: workers keep dying.
        """
        self._order, self._max_in_flight = order, max_in_flight
        self._bring_up()
        return [self._loaded[stage] for stage in range(self.n_stages)]

    def progress(self) -> list[tuple[int, int]]:
        """(bytes uploaded, bytes in total) of each stage, as last heard; may be called while `load` runs."""
        answers = [actor.progress.remote() for actor in self._actors]
        answered, _ = ray.wait(answers, num_returns=len(answers), timeout=_ANSWER_S)
        for stage, answer in enumerate(answers):
            if answer in answered:
                with contextlib.suppress(ray.exceptions.RayError):  # whoever loads will hear what is wrong
                    self._progress[stage] = ray.get(answer)
        return list(self._progress)

    def stats(self) -> list[dict[str, Any]]:
        """As `StageActor.stats`, of each stage."""
        return self._ask("stats")

    def memory_maps(self) -> list[dict[str, Any]]:
        """What is allocated on each stage's device."""
        return self._ask("memory_map")

    # What the engine needs

    @property
    def steps(self) -> StageGraph:
        """The way of steps through the stages."""
        assert self._graph is not None
        return self._graph

    def restore(self, loss: StepLost) -> None:
        """Replace dead and hung workers, on other GPUs if there are any, load and connect all stages anew.

        Raises:
            ModelError: the model's file cannot be read any more.
            PipelineError: workers keep dying.
        """
        self._replace(self._lost_stages(loss.timed_out))
        self._bring_up()

    def close(self) -> None:
        """End all actors and give back their resources. Idempotent."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._placement.close()

    # Single stages

    def _start(self, stage: int) -> Any:
        self._loaded.pop(stage, None)
        # Two threads, to answer questions while a model is loaded. Steps have a thread of their own.
        actor_class = self._actor_class.options(**self._placement.options(stage), max_concurrency=2)
        return actor_class.remote(stage, self._kind, self._n_neighbours[stage], self._configuration)

    def _replace(self, stages: list[int]) -> None:
        for stage in stages:
            ray.kill(self._actors[stage])
        if self._graph is not None:
            self._graph.close()  # after the kills, for it waits until every stage that lives has let go
            self._graph = None
        for stage in stages:
            self._placement.move(stage)
            self._actors[stage] = self._start(stage)

    def _bring_up(self) -> None:
        """Open devices, load what is not loaded, if there is an order, and connect all stages.

        Workers that fail are replaced. Raises PipelineError when they keep failing; ModelError as for `load`.
        """
        failures: Counter[str] = Counter()
        lost: list[int] = []
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            self._replace(lost)
            try:
                self._open()
                if self._order is not None:
                    self._load(self._order)
                    self._connect()
                return
            except _StagesLost as loss:
                lost, why = loss.stages, str(loss)
            logger.warning("attempt %d to bring up stages %s failed: the worker %s", attempt, lost, why)
            failures.update(f"stage {stage} on {self._placement.name(stage)}" for stage in lost)
        places = [f"{place} failed {'once' if n == 1 else f'{n} times'}" for place, n in failures.items()]
        raise PipelineError(
            f"the stages could not be brought up in {_MAX_ATTEMPTS} attempts: "
            f"{', '.join([*places, f'the last time the worker {why}'])} (its log in Ray's session folder "
            "says more)"
        )

    def _waiting(self) -> list[int]:
        """Stages whose workers have loaded nothing."""
        return [stage for stage in range(self.n_stages) if stage not in self._loaded]

    def _open(self) -> None:
        """Wait until new workers have opened their devices. Raises _StagesLost."""
        deadline_s = self._configuration.deadlines.start_s
        answers = {stage: self._actors[stage].report.remote() for stage in self._waiting()}
        ends = time.monotonic() + deadline_s
        lost = {}
        for stage, answer in answers.items():
            try:
                report: DeviceReport = ray.get(answer, timeout=max(0.0, ends - time.monotonic()))
            except ray.exceptions.GetTimeoutError:
                lost[stage] = f"has not started within {deadline_s:g} s; its device may hang"
            except ray.exceptions.RayError as error:
                lost[stage] = f"could not be started: {reason(error)}"
            else:
                self._placement.set_name(stage, report.where)
                wanted = self._reports.setdefault(stage, report).kind
                if report.kind != wanted:
                    lost[stage] = f"has opened a device of kind {report.kind}, not {wanted}"
        _check_lost(lost)

    def _load(self, order: LoadOrder) -> None:
        """Have new workers load their layers. Raises _StagesLost, and ModelError as for `load`."""
        loading = {
            self._actors[stage].load.remote(
                order.path,
                order.parts[stage],
                order.limits,
                handoff=order.handoff,
                fingerprint=order.fingerprint,
            ): stage
            for stage in self._waiting()
        }
        idle_s = self._configuration.deadlines.load_idle_s
        seen = dict.fromkeys(loading.values(), (0, 0))
        moved = dict.fromkeys(loading.values(), time.monotonic())
        lost = {}
        while loading:
            ended, _ = ray.wait(list(loading), num_returns=len(loading), timeout=_LOOK_S)
            for answer in ended:
                stage = loading.pop(answer)
                if why := self._take(stage, answer):
                    lost[stage] = why
            progress = self.progress() if loading else []
            for answer, stage in list(loading.items()):
                if progress[stage] != seen[stage]:
                    seen[stage], moved[stage] = progress[stage], time.monotonic()
                elif time.monotonic() - moved[stage] > idle_s:
                    lost[stage] = f"has not got on with loading for {idle_s:g} s"
                    del loading[answer]
        _check_lost(lost)

    def _take(self, stage: int, answer: Any) -> str:
        """Note that a stage has loaded, or say what became of its worker."""
        try:
            self._loaded[stage] = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            # Where the stage was moved to, it may be the file that is missing.
            is_models_fault = not isinstance(error.cause, (DeviceError, PoolError))
            if is_models_fault and self._placement.has_first_place(stage):
                raise ModelError(reason(error)) from error
            return f"could not load: {reason(error)}"
        except ray.exceptions.RayError as error:
            return f"died while it loaded: {reason(error)}"
        return ""

    def _connect(self) -> None:
        """Make the pipeline. Raises _StagesLost."""
        try:
            for stage in range(self.n_stages - 1):
                if self._share_a_host(stage, stage + 1):
                    self._connect_devices(stage)
            self._graph = StageGraph(self._actors, self._max_in_flight, self._configuration.deadlines.step_s)
        except ray.exceptions.RayError as error:
            why = f"died while the stages were connected: {reason(error)}"
            raise _StagesLost(self._lost_stages(timed_out=False), why) from error

    def _connect_devices(self, stage: int) -> None:
        """Let a stage hand over through device memory, if that works, and let go of what it had opened.

        A replaced stage has another inbox. Where an attempt failed, or ended a process, none is made again.
        """
        sender, receiver = self._actors[stage : stage + 2]
        deadline_s = self._configuration.deadlines.copy_s
        if stage not in self._through_host:
            self._through_host.add(stage)
            probe = sender.connect.remote(receiver.open_inbox.remote(self._max_in_flight))
            if ray.get(receiver.finds.remote(probe), timeout=deadline_s):
                self._through_host.remove(stage)
                return
        logger.warning("stages %d and %d hand over through host memory", stage, stage + 1)
        ray.get(sender.disconnect.remote(), timeout=deadline_s)

    def _share_a_host(self, stage: int, other: int) -> bool:
        """Whether two stages are GPUs of one kind on one node."""
        kinds = {self._reports[stage].kind, self._reports[other].kind}
        same_node = self._placement.node(stage) == self._placement.node(other)
        return len(kinds) == 1 and "cpu" not in kinds and same_node

    def _lost_stages(self, timed_out: bool) -> list[int]:
        """Stages that do not answer; after a timeout also those that are still in a step."""
        answers = [actor.step_seconds.remote() for actor in self._actors]
        deadline = time.monotonic() + _ANSWER_S
        lost = []
        for stage, answer in enumerate(answers):
            try:
                in_step = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:
                logger.warning("stage %d is lost: %s", stage, reason(error))
                lost.append(stage)
                continue
            if timed_out and in_step > 0:
                logger.warning("stage %d hangs: %.1f s in one step", stage, in_step)
                lost.append(stage)
        return lost

    def _ask(self, method: str) -> list[dict[str, Any]]:
        answers = [getattr(actor, method).remote() for actor in self._actors]
        try:
            return ray.get(answers, timeout=_REPORT_S)
        except ray.exceptions.RayError as error:
            raise PipelineError(f"a worker does not answer: {reason(error)}") from error


def _check_lost(lost: dict[int, str]) -> None:
    if lost:
        raise _StagesLost(lost, lost[max(lost)])
