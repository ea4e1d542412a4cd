"""A worker from file to answers: loading, figures, memory, and the actor class around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.gguf_models import tiny_config, write_model
from support.stages import LIMITS, split

from redshard.loader.gguf.gguf_file import GGUFError
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.configuration import PoolSettings, WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import open_device
from redshard.worker.memory.packing import PoolError
from redshard.worker.model.step_batch import TABLE_ENTRY_DTYPE, StepBatch
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.step_memory import step_bytes
from redshard.worker.model.weights import StagePart
from redshard.worker.worker import Worker

CONFIG = tiny_config("qwen3", n_layers=3)
WHOLE = StagePart(range(3), is_first=True, is_last=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("worker") / "model.gguf", CONFIG, QuantType.Q8_0)


def _worker() -> Worker:
    return Worker(open_device("cpu", 2))


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


def test_figures(model: Path) -> None:
    worker = _worker()
    reports: list[tuple[int, int]] = []
    stats = worker.load(model, WHOLE, LIMITS, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (stats.weight_bytes, stats.weight_bytes)
    assert (stats.kind, stats.first_layer, stats.end_layer) == ("cpu", 0, 3)
    cached = LIMITS.n_kv_blocks * LIMITS.block_size
    assert stats.kv_bytes == 2 * 3 * cached * 2 * (32 + 32)
    table_row = QuantType.Q8_0.nbytes((CONFIG.n_embd,))
    assert stats.weight_bytes_per_token == stats.weight_bytes - (CONFIG.n_vocab - 1) * table_row
    held = worker.memory_map()
    assert held.allocated_bytes == stats.weight_bytes + stats.kv_bytes + stats.other_bytes
    worker.stage.run(_batch())
    worker.stage.run(_batch())
    assert (worker.stats().steps, worker.stats().tokens) == (2, 6)
    assert worker.stats().busy_s > 0
    worker.close()


def test_parts_add_up_to_the_model(model: Path) -> None:
    whole = _worker()
    expected = whole.load(model, WHOLE, LIMITS)
    total = per_token = 0
    for part in split(3, 5):
        worker = _worker()
        stats = worker.load(model, part, LIMITS)
        total += stats.weight_bytes
        per_token += stats.weight_bytes_per_token
        worker.close()
    assert (total, per_token) == (expected.weight_bytes, expected.weight_bytes_per_token)
    whole.close()


def test_few_allocations_and_none_in_steps(model: Path) -> None:
    worker = Worker(
        open_device("cpu", 2), WorkerConfiguration(pool=PoolSettings(segment_bytes=1 << 18, alignment=256))
    )
    stats = worker.load(model, WHOLE, LIMITS)
    loaded = worker.memory_map()
    assert loaded.allocations <= -(-stats.weight_bytes // (1 << 18)) + 8
    for n_tokens in (1, 2, 16):
        worker.stage.run(_batch(n_tokens))
    assert worker.memory_map() == loaded
    worker.close()


@pytest.mark.parametrize(
    "limits", [LIMITS, replace(LIMITS, max_tokens=300, max_outputs=70), replace(LIMITS, max_context=5000)]
)
def test_steps_take_no_more_than_was_told(model: Path, limits: StepLimits) -> None:
    worker = _worker()
    other_bytes = worker.load(model, WHOLE, limits).other_bytes
    worker.close()
    told = step_bytes(CONFIG, limits)
    assert told / 2 < other_bytes < told + 64 * 1024


def test_no_room_on_the_device(model: Path) -> None:
    worker = _worker()
    with pytest.raises(PoolError, match="kv cache"):
        worker.load(model, WHOLE, replace(LIMITS, n_kv_blocks=1 << 26))
    worker.close()


@pytest.mark.parametrize(
    "part",
    [
        StagePart(range(4), True, True),
        StagePart(range(1, 3), True, True),
        StagePart(range(2), True, True),
        StagePart(range(1, 1), False, False),
        StagePart(range(0, 3, 2), False, False),
        StagePart(range(-1, 3), False, True),
    ],
)
def test_parts_that_are_none(model: Path, part: StagePart) -> None:
    worker = _worker()
    with pytest.raises(ValueError, match="layer"):
        worker.load(model, part, LIMITS)
    worker.close()


def test_wrong_use(model: Path, tmp_path: Path) -> None:
    worker = _worker()
    for call in (lambda: worker.stage.run(_batch()), worker.stats):
        with pytest.raises(ValueError, match="not loaded"):
            call()
    with pytest.raises(GGUFError, match=r"missing\.gguf"):
        worker.load(tmp_path / "missing.gguf", WHOLE, LIMITS)
    worker.load(model, WHOLE, LIMITS)
    with pytest.raises(ValueError, match="already"):
        worker.load(model, WHOLE, LIMITS)
    worker.close()
    worker.close()


def test_devices_that_are_not_there() -> None:
    for kind in ("hip", "cuda"):
        with pytest.raises(DeviceError, match=f"(?i){kind}"):
            open_device(kind)
    with pytest.raises(DeviceError, match="'tpu'"):
        open_device("tpu")
