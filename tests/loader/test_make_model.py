"""The benchmark models: formats mixed as llama.cpp mixes them, weights that keep activations in range."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from benchmarks.make_model import SHAPES, choose_types, llama3_freq_factors, make_model
from support.gguf_models import random_blocks, tiny_config

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.architectures import read_config
from redshard.loader.model.tensors import ModelTensors


@pytest.mark.parametrize(
    "quant_type", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
)
def test_random_blocks_have_the_deviation_asked_for(quant_type: str) -> None:
    rng = np.random.default_rng(1)
    blocks = random_blocks(rng, QuantType[quant_type], (64, 1024), std=0.02)
    dtype = {"F32": np.float32, "F16": np.float16}.get(quant_type, np.uint8)
    weights = gguf.dequantize(blocks.view(dtype), gguf.GGMLQuantizationType[quant_type])
    assert weights.shape == (64, 1024)
    assert np.isfinite(weights).all()
    assert abs(weights.mean()) < 0.004
    # A factor of two is all an exponent can be set to.
    assert weights.std() == pytest.approx(0.02, rel=0.45 if quant_type == "MXFP4" else 0.03)


def test_q4_k_m_is_mixed_as_llama_cpp_does() -> None:
    config = tiny_config(n_layers=32, n_embd=256, n_heads=8)
    choose = choose_types("Q4_K_M", config)
    square = (256, 256)
    more_bits = [i for i in range(32) if choose(f"blk.{i}.ffn_down.weight", square) is QuantType.Q6_K]
    assert more_bits == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more_bits == [i for i in range(32) if choose(f"blk.{i}.attn_v.weight", square) is QuantType.Q6_K]
    assert choose("blk.0.attn_q.weight", square) is QuantType.Q4_K
    assert choose("token_embd.weight", square) is QuantType.Q4_K
    assert choose("output.weight", square) is QuantType.Q6_K
    assert choose("blk.0.attn_q.weight", (256, 896)) is QuantType.Q5_0
    assert choose("blk.0.attn_v.weight", (256, 896)) is QuantType.Q8_0
    tied = choose_types("Q4_0", tiny_config(tied_embeddings=True))
    assert tied("token_embd.weight", square) is QuantType.Q6_K
    assert tied("token_embd.weight", (256, 896)) is QuantType.Q8_0
    assert tied("blk.0.ffn_up.weight", (256, 896)) is QuantType.Q4_0


@pytest.mark.parametrize("file_type", ["F16", "Q4_K_M"])
def test_small_model_is_sound(tmp_path: Path, file_type: str) -> None:
    path = tmp_path / "small.gguf"
    make_model("small", file_type, path, seed=1)
    with GGUFFile.open(path) as file:
        config = read_config(file)
        ModelTensors(config, file)
        shape = SHAPES["small"]
        assert (config.n_layers, config.n_embd, config.n_vocab) == (8, shape["n_embd"], shape["n_vocab"])
        tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
        assert isinstance(tokens, list)
        assert isinstance(merges, list)
        assert len(set(tokens)) == len(tokens) == 32000
        assert {merge.replace(" ", "") for merge in merges} <= set(tokens)
        types = Counter(info.type.name for info in file.tensors.values() if len(info.shape) == 2)
    assert types.most_common(1)[0][0] == ("Q4_K" if file_type == "Q4_K_M" else file_type)


def test_llama3_freq_factors() -> None:
    """High frequencies stay, low ones are divided by the factor, as published for Llama 3.1."""
    factors = llama3_freq_factors(128, 5e5, factor=8.0, low=1.0, high=4.0, original_context=8192)
    assert factors.shape == (64,)
    assert (factors[:29] == 1).all()
    assert (factors[35:] == 8).all()
    assert (np.diff(factors) >= 0).all()
