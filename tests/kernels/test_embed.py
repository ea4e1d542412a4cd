"""`embed` of every format, against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from support import native_ops, reference_ops
from support.gguf_models import random_blocks

import redshard._cpu as _cpu
from redshard.loader.gguf.quant_types import QuantType

SUPPORTED = [
    QuantType.F32,
    QuantType.F16,
    QuantType.BF16,
    QuantType.Q4_0,
    QuantType.Q8_0,
    QuantType.Q4_K,
    QuantType.Q6_K,
]


@pytest.mark.parametrize("quant_type", SUPPORTED, ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 33])
def test_embed(runtime: _cpu.Runtime, rng: np.random.Generator, quant_type: QuantType, n_tokens: int) -> None:
    n_vocab, width = 57, 3 * quant_type.block_elements if quant_type.block_elements > 1 else 67
    blocks = np.ascontiguousarray(random_blocks(rng, quant_type, (n_vocab, width), 1.0))
    table = gguf.dequantize(blocks, gguf.GGMLQuantizationType(quant_type.ggml_id)).reshape(n_vocab, width)
    token_ids = rng.integers(0, n_vocab, n_tokens).astype(np.int32)
    out = native_ops.embed(runtime, blocks, quant_type.ggml_id, width, token_ids, 1.5)
    np.testing.assert_allclose(out, reference_ops.embed(table, token_ids, 1.5), rtol=1e-6, atol=1e-7)


def test_embed_looks_up_what_was_sampled_last(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    table = rng.standard_normal((9, 8)).astype(np.float32)
    newest = np.array([4, 8, -1, 0], np.int32)
    token_ids = np.array([3, -1, -3, -4, -2], np.int32)
    out = native_ops.embed(runtime, table.view(np.uint8), QuantType.F32.ggml_id, 8, token_ids, 1.0, newest)
    np.testing.assert_array_equal(out, np.stack([table[3], table[4], np.zeros(8), table[0], table[8]]))


def test_embed_gives_zeros_for_ids_outside_the_table(runtime: _cpu.Runtime) -> None:
    table = np.ones((3, 8), np.float32)
    token_ids = np.array([-1, 3, 2, 2**31 - 1], np.int32)
    out = native_ops.embed(runtime, table.view(np.uint8), QuantType.F32.ggml_id, 8, token_ids, 1.0)
    np.testing.assert_array_equal(out[:, 0], [0, 0, 1, 0])
