"""`StageActor` on a stand-in AMD GPU, which may misbehave once."""

from __future__ import annotations

import os
from pathlib import Path

from support import standin

from cluster.stage_actor import StageActor
from worker.configuration import WorkerConfiguration
from worker.device.choose import DeviceKind


def standin_stage_actor(trouble: Path) -> type[StageActor]:
    """A stage on a stand-in GPU of its own.

    Args:
        trouble: a directory. A file ``STAGE.SETTING`` in it has the next worker of that stage start with its
            text as STANDIN_HIP_SETTING; then the file goes.
    """

    class StandinStageActor(StageActor):
        def __init__(
            self, stage: int, kind: DeviceKind, n_neighbours: int, configuration: WorkerConfiguration
        ) -> None:
            os.environ.update(standin.environment())
            for file in trouble.glob(f"{stage}.*"):
                os.environ[f"STANDIN_HIP_{file.suffix[1:]}"] = file.read_text()
                file.unlink()
            standin.load()
            super().__init__(stage, kind, n_neighbours, configuration)

    return StandinStageActor
