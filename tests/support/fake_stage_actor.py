"""`StageActor` around the toy model: everything of the cluster but the device and the weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from support.fake_worker import FakeStage

from cluster.stage_actor import DeviceReport, StageActor
from loader.gguf_file import GGUFFile
from loader.model_config import ModelConfig
from worker.configuration import WorkerConfiguration
from worker.device.choose import DeviceKind
from worker.stage import HandoffType
from worker.step_batch import StepBatch, StepResult
from worker.step_inputs import StepLimits


class FakeStageActor(StageActor):
    """A stage of the toy model that runs no device."""

    def __init__(
        self, stage: int, kind: DeviceKind, n_neighbours: int, configuration: WorkerConfiguration
    ) -> None:
        self._stage_number = stage
        self._progress = (0, 0)
        self._step_began = None

    def report(self) -> DeviceReport:
        """A device of 8 GiB."""
        return DeviceReport("fake", "cpu", 8 << 30, 8 << 30, os.getpid())

    def load(
        self,
        path: str,
        first_layer: int,
        end_layer: int,
        limits: StepLimits,
        memory_budget: int | None = None,
        handoff: HandoffType = "float32",
    ) -> dict[str, int]:
        """An empty cache."""
        with GGUFFile.open(Path(path)) as file:
            is_last = end_layer == ModelConfig.from_gguf(file).n_layers
        n_stages = self._stage_number + (1 if is_last else 2)
        self._fake = FakeStage(self._stage_number, n_stages, limits.n_kv_blocks, limits.block_size)
        self._progress = (1, 1)
        return {"first_layer": first_layer, "end_layer": end_layer}

    def run(self, batch: StepBatch, hidden: np.ndarray | None = None) -> np.ndarray | StepResult:
        """One step of the toy model."""
        return self._fake.run(batch, hidden)

    def stats(self) -> dict[str, int]:
        """Next to nothing."""
        return {"stage": self._stage_number}
