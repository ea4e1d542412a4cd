"""The actors of one pipeline: placed, started, loaded, and replaced when they die."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.engine import StepLost
from cluster.errors import ModelError, PipelineError
from cluster.pipeline import Pipeline
from cluster.stage_actor import DeviceReport, StageActor
from worker.configuration import WorkerConfiguration
from worker.device.choose import DeviceKind
from worker.forward import StagePart
from worker.handoff import HandoffType
from worker.step_batch import StepBatch, StepResult
from worker.step_inputs import StepLimits
from worker.worker import WorkerStats

logger = logging.getLogger(__name__)

#: What a stage on the CPU takes of Ray's own count: next to nothing, since its threads are set explicitly.
CPU_BUNDLE = {"CPU": 0.01}
GPU_BUNDLE = {"GPU": 1.0}

_PLACEMENT_S = 60.0
_REPORT_S = 60.0
#: A stage that does not answer for this long after a loss is lost too.
_ANSWER_S = 5.0
#: Times that stages are started again before the pipeline is given up.
_MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What the stages load: parts[i] of the model on stage i, for steps within `limits`."""

    path: str
    parts: tuple[StagePart, ...]
    limits: StepLimits
    handoff: HandoffType


class WorkerGroup:
    """One `StageActor` for each stage, in a placement group with a bundle for each, and their pipeline.

    Args:
        n_stages: actors.
        kind: of device; "cpu" takes no GPU.
        configuration: of the workers.
        deadline_s: seconds a step may take.
        actor_class: `StageActor`, or what stands in for it in tests.

    Raises:
        PipelineError: the cluster has no room, or a device cannot be opened.
    """

    def __init__(
        self,
        n_stages: int,
        kind: DeviceKind,
        configuration: WorkerConfiguration,
        deadline_s: float,
        actor_class: type[StageActor] = StageActor,
    ) -> None:
        self._kind, self._configuration, self._deadline_s = kind, configuration, deadline_s
        self._bundle = CPU_BUNDLE if kind == "cpu" else GPU_BUNDLE
        self._actor_class: Any = ray.remote(actor_class)
        self._order: LoadOrder | None = None
        self._pipeline: Pipeline | None = None
        self._through_host: set[int] = set()
        self._progress: list[tuple[int, int]] = []
        self._placement = _place([self._bundle] * n_stages)
        nodes = placement_group_table(self._placement)["bundles_to_node_id"]
        stages_on = Counter(nodes.values())
        self._nodes = [nodes[stage] for stage in range(n_stages)]
        self._n_neighbours = [stages_on[node] for node in self._nodes]
        self._actors = [self._start(stage) for stage in range(n_stages)]
        self.reports = self._open_devices()

    @property
    def n_stages(self) -> int:
        """How many stages there are."""
        return len(self._actors)

    def stage_memory(self) -> list[int]:
        """Free bytes for each stage; stages on one node's CPUs share its memory."""
        return [
            report.free_memory // (neighbours if report.kind == "cpu" else 1)
            for report, neighbours in zip(self.reports, self._n_neighbours, strict=True)
        ]

    def load(self, order: LoadOrder, max_in_flight: int) -> list[WorkerStats]:
        """Load all stages at once, then connect them.

        Raises:
            ModelError: a stage cannot load its part.
            PipelineError: a stage died meanwhile.
        """
        self._order, self._max_in_flight = order, max_in_flight
        stats = self._load(range(self.n_stages))
        try:
            self._connect()
        except PipelineError as error:
            self.restore(StepLost(str(error)))
        return stats

    def progress(self) -> list[tuple[int, int]]:
        """(bytes uploaded, bytes in total) of each stage; may be called while `load` runs."""
        answers = [actor.progress.remote() for actor in self._actors]
        with contextlib.suppress(ray.exceptions.RayError):  # whoever loads will hear what is wrong
            self._progress = ray.get(answers, timeout=_ANSWER_S)
        return self._progress

    def stats(self) -> list[dict[str, Any]]:
        """As `StageActor.stats`, of each stage."""
        return self._ask("stats")

    def memory_maps(self) -> list[dict[str, Any]]:
        """What is allocated on each stage's device."""
        return self._ask("memory_map")

    # What the engine needs

    def submit(self, batch: StepBatch) -> None:
        """As `Pipeline.submit`."""
        assert self._pipeline is not None
        self._pipeline.submit(batch)

    def collect(self) -> StepResult:
        """As `Pipeline.collect`."""
        assert self._pipeline is not None
        return self._pipeline.collect()

    def restore(self, loss: StepLost) -> None:
        """Replace dead and hung stages in their bundles, load their layers, and connect all stages anew.

        Raises:
            PipelineError: stages keep dying, or cannot load.
        """
        lost = self._lost_stages(loss.timed_out)
        for stage in lost:
            ray.kill(self._actors[stage])
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                for stage in lost:
                    self._actors[stage] = self._start(stage)
                self._load(lost)
                self._connect()
                return
            except (PipelineError, ModelError, ray.exceptions.RayError) as error:
                logger.warning("attempt %d to bring back stages %s failed: %s", attempt, lost, error)
                if attempt == _MAX_ATTEMPTS:
                    raise PipelineError(
                        f"stages {lost} could not be brought back in {attempt} attempts: {error}"
                    ) from error
                lost = sorted({*lost, *self._lost_stages(timed_out=False)})
                for stage in lost:
                    ray.kill(self._actors[stage])

    def close(self) -> None:
        """End all actors and give back their resources. Idempotent."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        remove_placement_group(self._placement)

    # Single stages

    def _start(self, stage: int) -> Any:
        options = {"num_cpus": self._bundle.get("CPU", 0), "num_gpus": self._bundle.get("GPU", 0)}
        strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=stage)
        # Two threads, to answer questions while a model is loaded. Steps have a thread of their own.
        actor_class = self._actor_class.options(**options, scheduling_strategy=strategy, max_concurrency=2)
        return actor_class.remote(stage, self._kind, self._n_neighbours[stage], self._configuration)

    def _open_devices(self) -> list[DeviceReport]:
        deadline_s = self._configuration.deadlines.start_s
        try:
            return ray.get([actor.report.remote() for actor in self._actors], timeout=deadline_s)
        except ray.exceptions.GetTimeoutError as error:
            self.close()
            raise PipelineError(
                f"not all workers have started within {deadline_s:g} s; a device may hang"
            ) from error
        except ray.exceptions.RayError as error:
            self.close()
            raise PipelineError(f"a worker could not be started: {_cause(error)}") from error

    def _load(self, stages: range | list[int]) -> list[WorkerStats]:
        assert self._order is not None
        order = self._order
        loading = [
            self._actors[stage].load.remote(
                order.path,
                order.parts[stage],
                order.limits,
                handoff=order.handoff,
            )
            for stage in stages
        ]
        try:
            return ray.get(loading)
        except ray.exceptions.RayTaskError as error:
            raise ModelError(_cause(error)) from error
        except ray.exceptions.RayError as error:
            raise PipelineError(f"a worker died while it loaded: {_cause(error)}") from error

    def _connect(self) -> None:
        try:
            for stage in range(self.n_stages - 1):
                if self._share_a_host(stage, stage + 1):
                    self._connect_devices(stage)
        except ray.exceptions.RayError as error:
            raise PipelineError(f"a worker died while the stages were connected: {_cause(error)}") from error
        self._pipeline = Pipeline(self._actors, self._max_in_flight, self._deadline_s)

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
        kinds = {self.reports[stage].kind, self.reports[other].kind}
        return len(kinds) == 1 and "cpu" not in kinds and self._nodes[stage] == self._nodes[other]

    def _lost_stages(self, timed_out: bool) -> list[int]:
        """Stages that do not answer; after a timeout also those that are still in a step."""
        answers = [actor.step_seconds.remote() for actor in self._actors]
        deadline = time.monotonic() + _ANSWER_S
        lost = []
        for stage, answer in enumerate(answers):
            try:
                in_step = ray.get(answer, timeout=max(0.1, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:
                logger.warning("stage %d is lost: %s", stage, _cause(error))
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
            raise PipelineError(f"a worker does not answer: {_cause(error)}") from error


def _place(bundles: list[dict[str, float]]) -> PlacementGroup:
    n_stages = len(bundles)
    for name, amount in bundles[0].items():
        there = ray.cluster_resources().get(name, 0)
        if there < amount * n_stages:
            raise PipelineError(
                f"{_count(n_stages, 'stage')} must have {_count(amount * n_stages, name)}, but the cluster "
                f"has {there:g}; use fewer stages, or device 'cpu'"
            )
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(_PLACEMENT_S):
        with contextlib.suppress(ray.exceptions.RayError):
            remove_placement_group(group)
        raise PipelineError(
            f"after {_PLACEMENT_S:g} s the cluster still has no room for {n_stages} stages; "
            "use fewer stages or end what else is running there"
        )
    return group


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{cause}".partition("\n")[0] or type(cause).__name__


def _count(n: float, noun: str) -> str:
    return f"{n:g} {noun}{'' if n == 1 else 's'}"
