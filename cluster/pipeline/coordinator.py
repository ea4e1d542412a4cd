"""Plan, place, load, run: the actor that owns one pipeline. It lives on no CPU and dies with its owner."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from redshard.cluster.engine.engine import Engine
from redshard.cluster.engine.exchange import Exchange
from redshard.cluster.engine.scheduler import STEPS_AHEAD, Scheduler
from redshard.cluster.errors import ModelError, PipelineError
from redshard.cluster.pipeline.plan import (
    PipelineSettings,
    overhead_bytes,
    plan_with_cache,
    stage_parts,
    step_limits,
)
from redshard.cluster.pipeline.stage_actor import DeviceReport, StageActor
from redshard.cluster.pipeline.workers import LoadOrder, WorkerGroup
from redshard.loader.gguf.gguf_file import GGUFFile, TensorInfo
from redshard.loader.model.architectures import read_config
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.shard_plan import DeviceBudget, ModelSize
from redshard.loader.tokenizer.tokenizer import Tokenizer
from redshard.worker.device.choose import DeviceKind
from redshard.worker.device.support import UnsupportedOnDeviceError, check_device_support
from redshard.worker.worker import WorkerStats

#: The share of a device's free memory that a plan may use; runtimes and neighbours take the rest.
_GPU_SHARE = 0.92
_CPU_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class PipelineInfo:
    """A loaded pipeline.

    Attributes:
        max_length: tokens of the longest sequence it can run.
        cache_tokens: what its cache holds.
        workers: one for each stage.
        warning: why it runs on CPUs although the cluster counts enough GPUs; "" otherwise.
    """

    max_length: int
    cache_tokens: int
    workers: list[WorkerStats]
    warning: str


class Coordinator(Exchange):
    """Owns the workers of one pipeline and the engine that feeds them; clients meet it as an exchange.

    As a Ray actor it needs several threads: `poll` waits for output while other calls come in.

    Args:
        actor_class: of the stages.
    """

    def __init__(self, actor_class: type[StageActor] = StageActor) -> None:
        super().__init__()
        logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s coordinator: %(message)s")
        self._actor_class = actor_class
        self._group: WorkerGroup | None = None
        self._engine: Engine | None = None

    def start(self, settings: PipelineSettings) -> PipelineInfo:
        """Place the workers, load the model onto them, and begin to serve.

        Raises:
            ModelError: it cannot be read or does not fit.
            PipelineError: the cluster has no room, or a worker cannot be started.
        """
        try:
            return self._start(settings)
        except BaseException:
            self.close()
            raise

    def progress(self) -> list[tuple[int, int]]:
        """(bytes uploaded, bytes in total) of each stage; nothing before there are workers."""
        return self._group.progress() if self._group is not None else []

    def abort(self, request_ids: list[str], *submitted: None) -> None:
        """As `Exchange.abort`, once the calls of `add` have returned whose references are `submitted`."""
        super().abort(request_ids)

    def state(self) -> str:
        """What it does: "loading", "serving", "recovering", "failed" or "closed"."""
        return self._engine.state if self._engine is not None else "loading"

    def stats(self) -> dict[str, Any]:
        """`state`, `times` (`EngineTimes`), and `workers` (`WorkerStats` of each stage)."""
        engine = self._serving()
        workers = self._group.stats() if self._group is not None else []
        return {"state": engine.state, "times": asdict(engine.times), "workers": workers}

    def memory_maps(self) -> list[dict[str, Any]]:
        """What is allocated on each stage's device."""
        return self._group.memory_maps() if self._group is not None else []

    def close(self) -> None:
        """Stop serving and end the workers. Idempotent."""
        if self._engine is not None:
            self._engine.close()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _start(self, settings: PipelineSettings) -> PipelineInfo:
        try:
            with GGUFFile.open(settings.path) as file:
                config = read_config(file)
                tensors = ModelTensors(config, file)
                size = ModelSize.of(config, tensors)
                tokenizer = Tokenizer.from_metadata(file.metadata)
                stored = list(file.tensors.values())
                fingerprint = file.fingerprint()
        except (ValueError, OSError) as error:
            raise ModelError(str(error)) from error
        group, warning = self._open_group(settings)
        _check_support(config, tensors, stored, group.reports)
        shares = [
            int(memory * (_CPU_SHARE if report.kind == "cpu" else _GPU_SHARE))
            for memory, report in zip(group.stage_memory(), group.reports, strict=True)
        ]
        devices = [DeviceBudget(share) for share in shares]
        plan, cache_tokens = plan_with_cache(
            size, devices, settings, partial(overhead_bytes, config, settings)
        )
        limits = step_limits(settings, cache_tokens)
        order = LoadOrder(
            settings.path,
            fingerprint,
            stage_parts(plan),
            limits,
            settings.handoff,
        )
        workers = group.load(order, max_in_flight=settings.n_stages + STEPS_AHEAD)
        scheduler = Scheduler(limits, settings.n_stages)
        self._engine = Engine(scheduler, group, tokenizer, self)
        n_tokens = limits.n_kv_blocks * limits.block_size
        return PipelineInfo(scheduler.limits.max_length, n_tokens, workers, warning)

    def _open_group(self, settings: PipelineSettings) -> tuple[WorkerGroup, str]:
        """The workers, and a warning if "auto" gives up GPUs that Ray counts but no worker can open.

        Not an error, since that is every machine with a GPU that has none of the runtimes installed.
        """
        group = self._new_group(settings, settings.kind)
        report = next((report for report in group.reports if report.why_no_gpu), None)
        if report is None:
            return group, ""
        group.close()
        warning = (
            f"the model runs on CPUs: Ray counts {report.where}, but it cannot be opened "
            f"({report.why_no_gpu}); choose device 'cpu' if that is meant"
        )
        return self._new_group(settings, "cpu"), warning

    def _new_group(self, settings: PipelineSettings, kind: DeviceKind) -> WorkerGroup:
        self._group = WorkerGroup(settings.n_stages, kind, settings.worker, self._actor_class)
        return self._group

    def _serving(self) -> Engine:
        if self._engine is None:
            raise PipelineError("the model is not loaded yet")
        return self._engine


def _check_support(
    config: ModelConfig, tensors: ModelTensors, stored: list[TensorInfo], reports: list[DeviceReport]
) -> None:
    """Raise ModelError if a device has no kernels for the model."""
    try:
        for report in reports:
            check_device_support(config, tensors, stored, report.kind)
    except UnsupportedOnDeviceError as error:
        raise ModelError(str(error)) from error
