"""Forward passes of random models against a float64 reference, for what the conformance kit does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import tiny_config, write_model
from support.reference_model import ReferenceModel
from support.stages import Pipeline, relative_error

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.choose import open_device

F16, F32, BF16 = QuantType.F16, QuantType.F32, QuantType.BF16
Q4_0, Q8_0, Q4_K, Q6_K = QuantType.Q4_0, QuantType.Q8_0, QuantType.Q4_K, QuantType.Q6_K

FLOAT_MODELS: dict[str, tuple[QuantType, dict[str, Any]]] = {
    "llama": (F32, {}),
    "qwen2": (F16, {"architecture": "qwen2"}),
    "qwen3": (BF16, {"architecture": "qwen3"}),
    "yarn": (F16, {"rope": {"scaling": "yarn", "factor": 4.0, "original_context": 64}}),
    "yarn-neox": (
        F32,
        {
            "architecture": "qwen2",
            "rope": {
                "scaling": "yarn",
                "factor": 8.0,
                "original_context": 32,
                "base": 1e6,
                "attention_factor": 0.9,
            },
        },
    ),
    "linear": (F16, {"rope": {"scaling": "linear", "factor": 3.0}}),
    "wide-heads": (F16, {"n_embd": 96, "head_dim": 64, "n_heads": 3, "n_kv_heads": 1}),
    "small-heads": (
        F32,
        {"architecture": "qwen3", "n_embd": 200, "head_dim": 16, "n_heads": 6, "n_kv_heads": 2},
    ),
    "value-unlike-key": (F16, {"head_dim": 48, "value_dim": 24}),
    "partial-rotary": (F16, {"rope": {"n_rot": 12}}),
    "partial-rotary-neox": (F16, {"architecture": "qwen3", "rope": {"n_rot": 20}}),
    "no-grouping": (F32, {"n_heads": 3, "n_kv_heads": 3}),
    "tied": (BF16, {"tied_embeddings": True}),
    "odd-widths": (F16, {"n_embd": 77, "head_dim": 26, "n_heads": 5, "n_kv_heads": 5, "n_ff": 131}),
    "layers-that-differ": (
        F32,
        {
            "architecture": "qwen3",
            "n_layers": 4,
            "n_embd": 96,
            "n_heads": [4, 2, 6, 3],
            "n_kv_heads": [2, 2, 1, 3],
            "n_ff": [64, 256, 32, 128],
        },
    ),
    "deep": (F16, {"n_layers": 7, "architecture": "qwen2", "tied_embeddings": True}),
}


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_float_model(name: str, tmp_path: Path) -> None:
    quant_type, changes = FLOAT_MODELS[name]
    path = write_model(tmp_path / "model.gguf", tiny_config(**changes), quant_type, seed=len(name))
    assert _error(path) < 1e-4


def test_frequency_factors(tmp_path: Path) -> None:
    factors = np.random.default_rng(0).uniform(1, 8, 16).astype(np.float32)
    path = write_model(tmp_path / "model.gguf", tiny_config(), F16, freq_factors=factors)
    assert _error(path) < 1e-4


def _by_role(types: dict[str, QuantType], default: QuantType) -> Callable[[str, tuple[int, ...]], QuantType]:
    return lambda name, shape: next((types[role] for role in types if role in name), default)


@pytest.mark.parametrize(
    "types",
    [
        _by_role({"attn_v": Q6_K, "ffn_down": Q6_K, "token_embd": Q6_K}, Q4_K),
        _by_role({"attn_k": F16, "ffn_up": F32, "attn_output": BF16}, Q8_0),
        _by_role({"token_embd": Q8_0, "attn_q": Q8_0, "ffn_gate": F16}, Q4_0),
        _by_role({"output": Q6_K}, Q4_0),
    ],
    ids=["q4_k_m", "floats-among-q8_0", "mixed-q4_0", "output-q6_k"],
)
def test_mixture_of_formats(types: Callable[[str, tuple[int, ...]], QuantType], tmp_path: Path) -> None:
    config = tiny_config("qwen2", n_heads=8)
    path = write_model(tmp_path / "model.gguf", config, types, seed=3)
    assert _error(path) < 3e-2


@pytest.mark.parametrize("quant_type", [F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q6_K])
def test_chunks_and_stages_change_nothing(quant_type: QuantType, tmp_path: Path) -> None:
    config = tiny_config("qwen3", n_layers=3, n_heads=8, n_ff=512)
    path = write_model(tmp_path / "model.gguf", config, quant_type)
    tokens = _tokens(path)
    with Pipeline(path) as pipeline:
        whole = pipeline.logits_in_chunks(tokens)
        for lengths in [(1,) * len(tokens), (64,), (31, 33, 1), (5, 90)]:
            np.testing.assert_array_equal(pipeline.logits_in_chunks(tokens, *lengths), whole)
    for n_stages in (2, 3, 5):
        with Pipeline(path, n_stages, seed=n_stages) as pipeline:
            np.testing.assert_array_equal(pipeline.logits_in_chunks(tokens, 17, 1), whole)


def test_threads_change_nothing(tmp_path: Path) -> None:
    types = _by_role({"attn": Q8_0, "ffn_up": F16, "ffn_down": Q4_0}, Q8_0)
    path = write_model(tmp_path / "model.gguf", tiny_config("qwen2"), types)
    results = []
    for n_threads in (1, 2, 5):
        with Pipeline(path, devices=[open_device("cpu", n_threads)]) as pipeline:
            results.append(pipeline.logits_in_chunks(_tokens(path), 100, 1))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def _tokens(path: Path) -> np.ndarray:
    return np.random.default_rng(len(path.name)).integers(0, tiny_config().n_vocab, 120).astype(np.int32)


def _error(path: Path) -> float:
    """Relative error of all logits of 120 positions, prefilled in two chunks."""
    tokens = _tokens(path)
    reference = ReferenceModel(path, cache_dtype=np.float16).logits(tokens)
    with Pipeline(path) as pipeline:
        return relative_error(pipeline.logits_in_chunks(tokens, 70), reference)
