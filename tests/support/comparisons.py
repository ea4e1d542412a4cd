"""What results of kernels are compared with, and how closely."""

from __future__ import annotations

import gguf
import numpy as np
from support.reference_ops import Quantized

from redshard.loader.gguf.quant_types import QuantType

#: Types of weights that GPUs have kernels for.
FLOAT_TYPES = [QuantType.F32, QuantType.F16, QuantType.BF16]
BLOCK_TYPES = [QuantType.Q4_0, QuantType.Q8_0, QuantType.Q4_K, QuantType.Q6_K]
GPU_TYPES = FLOAT_TYPES + BLOCK_TYPES


def dequantized(blocks: np.ndarray, quant_type: QuantType) -> np.ndarray:
    """What blocks of weights mean, float64."""
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType(quant_type.ggml_id)).astype(np.float64)


def assert_close(ours: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> None:
    """No element is further off than its tolerance."""
    error = np.abs(ours - expected)
    assert (error <= tolerance).all(), f"{(error / tolerance).max()} times the tolerance"


def assert_quantized(ours: Quantized, values: np.ndarray) -> None:
    """The quants stand for values that differ by rounding, and scales and sums are right."""
    step = np.repeat(ours.scales, 32, axis=-1)
    assert (np.abs(ours.values() - values) <= 0.51 * step + 1e-6).all()
    largest = np.abs(values).reshape(*values.shape[:-1], -1, 32).max(axis=-1)
    np.testing.assert_allclose(ours.scales, largest / 127, rtol=1e-5, atol=1e-9)
    sums = ours.quants.reshape(*ours.scales.shape, 32).sum(axis=-1, dtype=np.int32) * ours.scales
    np.testing.assert_allclose(ours.sums, sums, rtol=1e-6)
