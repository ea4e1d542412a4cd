"""`StageActor` around the toy model: everything of the cluster but the device and the weights."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from support.fake_worker import FakeStage

from redshard.cluster.pipeline.stage_actor import DeviceReport, StageActor, place_name
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.choose import DeviceKind
from redshard.worker.model.handoff import HandoffType
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart


class FakeStageActor(StageActor):
    """A stage of the toy model that runs no device."""

    def __init__(
        self, stage: int, kind: DeviceKind, n_neighbours: int, configuration: WorkerConfiguration
    ) -> None:
        self._stage_number = stage
        self._progress = (0, 0)
        self._step_began = None
        self._launched = None

    def report(self) -> DeviceReport:
        """A device of 8 GiB."""
        return DeviceReport("fake", "cpu", 8 << 30, 8 << 30, place_name())

    def load(
        self,
        path: str,
        part: StagePart,
        limits: StepLimits,
        handoff: HandoffType = "float32",
        fingerprint: str | None = None,
    ) -> dict[str, int]:
        """An empty cache."""
        n_stages = self._stage_number + (1 if part.is_last else 2)
        self._fake = FakeStage(self._stage_number, n_stages, limits.n_kv_blocks, limits.block_size)
        # A step is done when it is launched.
        self._worker = SimpleNamespace(
            stage=SimpleNamespace(launch=self.run, finish=lambda launched: launched)
        )
        self._progress = (1, 1)
        return {"layers": len(part.layers)}

    @property
    def runs_behind(self) -> bool:
        """As a GPU that has the whole model."""
        return self._fake.n_stages == 1

    def run(self, batch: StepBatch, hidden: np.ndarray | None = None) -> np.ndarray | StepResult:
        """One step of the toy model."""
        return self._fake.run(batch, hidden)

    def stats(self) -> dict[str, Any]:
        """The process, and the GPUs that Ray gave it."""
        return {"stage": self._stage_number, "pid": os.getpid(), "gpus": ray.get_gpu_ids()}
