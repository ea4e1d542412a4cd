"""Models are refused before they are loaded where a device has no kernels for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import tiny_config, write_model

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.architectures import read_config
from redshard.loader.model.tensors import ModelTensors
from redshard.worker.device.support import UnsupportedOnDeviceError, check_device_support


def check(path: Path, kind: str) -> None:
    with GGUFFile.open(path) as file:
        config = read_config(file)
        check_device_support(config, ModelTensors(config, file), file.tensors.values(), kind)


def mixed(name: str, shape: tuple[int, ...]) -> QuantType:
    return QuantType.Q4_0 if "ffn_up" in name else QuantType.Q8_0


@pytest.mark.parametrize(
    ("options", "types", "reason"),
    [
        (
            {"head_dim": 20, "value_dim": 20},
            QuantType.F16,
            "heads of 20 elements.*multiples of 8 and at most 256",
        ),
        ({"head_dim": 320, "value_dim": 320}, QuantType.Q8_0, "heads of 320 elements"),
        ({}, mixed, "'blk.0.ffn_gate.weight' has type Q8_0, 'blk.0.ffn_up.weight' Q4_0.*on AMD GPUs"),
        ({}, QuantType.Q5_0, "type Q5_0, for which there is no kernel on AMD GPUs; supported are F32"),
    ],
    ids=["odd heads", "large heads", "two types", "unknown type"],
)
def test_what_only_cpus_can(tmp_path: Path, options: dict[str, Any], types: Any, reason: str) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_config(n_layers=2, **options), types)
    check(path, "cpu")
    check(path, "auto")
    with pytest.raises(UnsupportedOnDeviceError, match=reason):
        check(path, "hip")


def test_what_all_can(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", tiny_config(n_layers=2), QuantType.Q4_0)
    for kind in ("cpu", "hip", "cuda", "auto"):
        check(path, kind)
