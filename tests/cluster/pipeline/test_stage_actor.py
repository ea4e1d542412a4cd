"""The actor of a stage, as a plain object: what it says and does in its process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.gguf_models import tiny_config, write_model
from support.stages import LIMITS, split

from redshard.cluster.pipeline.stage_actor import StageActor
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.model.step_batch import TABLE_ENTRY_DTYPE, StepBatch, StepResult


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("actor") / "model.gguf"
    return write_model(path, tiny_config("qwen3", n_layers=3), QuantType.Q8_0)


def _batch(n_tokens: int = 3) -> StepBatch:
    positions = np.arange(n_tokens, dtype=np.int32)
    return StepBatch(
        step_id=0,
        token_ids=positions + 5,
        positions=positions,
        query_starts=np.array([0, n_tokens], np.int32),
        slots=np.zeros(1, np.int32),
        table_entries=np.array([(0, 0, 2)], TABLE_ENTRY_DTYPE),
        output_rows=positions,
        return_logits=True,
    )


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, which an actor sets up for its process; restored afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


def test_two_stages(model: Path, root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = split(3, 2)
    workers = [StageActor(stage, "cpu", 2, WorkerConfiguration(), log_level="INFO") for stage in range(2)]
    assert workers[0].progress() == (0, 0)
    stats = [workers[0].load(str(model), first, LIMITS), workers[1].load(str(model), second, LIMITS)]
    assert f"INFO stage 1 (pid {os.getpid()}): loaded layers [1, 3)" in capsys.readouterr().err
    assert workers[0].progress() == (stats[0].weight_bytes, stats[0].weight_bytes)
    result = workers[1].run(_batch(), workers[0].run(_batch()))
    assert isinstance(result, StepResult)
    assert workers[1].stats()["steps"] == 1
    assert workers[1].memory_map()["allocated_bytes"] > stats[1].weight_bytes
    for worker in workers:
        worker.close()


def test_modules_do_not_need_ray() -> None:
    code = "import sys; import redshard.cluster.pipeline.stage_actor; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
