"""That steps take what was told before there was a device, whatever the layers and the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import tiny_config, write_model
from support.stages import LIMITS, split

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.choose import open_device
from redshard.worker.model.step_memory import step_bytes
from redshard.worker.worker import Worker

SHAPES: dict[str, dict[str, Any]] = {
    "wide-feed-forward": {"n_ff": 2048},
    "wide-heads": {"head_dim": 64, "value_dim": 96, "n_embd": 64},
    "layers-that-differ": {
        "n_layers": 3,
        "n_heads": [4, 16, 2],
        "n_kv_heads": [4, 4, 1],
        "n_ff": [64, 32, 512],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q8_0])
@pytest.mark.parametrize("n_stages", [1, 2])
def test_no_stage_takes_more(tmp_path: Path, shape: str, quant_type: QuantType, n_stages: int) -> None:
    config = tiny_config("qwen3", **SHAPES[shape])
    path = write_model(tmp_path / "model.gguf", config, quant_type)
    told = step_bytes(config, LIMITS)
    taken = []
    for part in split(config.n_layers, n_stages):
        worker = Worker(open_device("cpu", 1))
        taken.append(worker.load(path, part, LIMITS).other_bytes)
        worker.close()
    # The rest is padding of weights, and what stays by slot.
    assert told / 2 < max(taken) < told + 64 * 1024
