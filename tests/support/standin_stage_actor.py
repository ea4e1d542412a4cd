"""`StageActor` on a stand-in AMD GPU, which may misbehave once."""

from __future__ import annotations

import os
from pathlib import Path

import ray
from support import standin

from redshard.cluster.pipeline.stage_actor import StageActor
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.choose import DeviceKind


def standin_stage_actor(trouble: Path) -> type[StageActor]:
    """A stage on a stand-in GPU of its own.

    Args:
        trouble: a directory. A file ``STAGE.SETTING`` in it has the next worker of that stage start with its
            text as STANDIN_HIP_SETTING; then the file goes. A file ``gpuNUMBER.SETTING`` stays, for every
            worker on that GPU.
    """

    class StandinStageActor(StageActor):
        def __init__(
            self, stage: int, kind: DeviceKind, n_neighbours: int, configuration: WorkerConfiguration
        ) -> None:
            (gpu,) = ray.get_gpu_ids()
            os.environ.update(standin.environment(devices=gpu + 1), HIP_VISIBLE_DEVICES=str(gpu))
            for file in (*trouble.glob(f"{stage}.*"), *trouble.glob(f"gpu{gpu}.*")):
                os.environ[f"STANDIN_HIP_{file.suffix[1:]}"] = file.read_text()
                if file.stem == str(stage):
                    file.unlink()
            standin.load()
            super().__init__(stage, kind, n_neighbours, configuration)

    return StandinStageActor
