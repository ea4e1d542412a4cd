"""`rms_norm` and the quantization of activations, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import native_ops, reference_ops

import redshard._cpu as _cpu


def assert_same_bits(actual: reference_ops.Quantized, expected: reference_ops.Quantized) -> None:
    np.testing.assert_array_equal(actual.quants, expected.quants)
    np.testing.assert_array_equal(actual.scales, expected.scales)
    np.testing.assert_array_equal(actual.sums, expected.sums)


@pytest.mark.parametrize("width", [1, 5, 16, 64, 80, 97, 896])
@pytest.mark.parametrize("n_tokens", [1, 2, 33])
def test_rms_norm_values(runtime: _cpu.Runtime, rng: np.random.Generator, width: int, n_tokens: int) -> None:
    x = rng.standard_normal((n_tokens, width), np.float32) * 3
    weight = rng.standard_normal(width, np.float32)
    out = native_ops.rms_norm(runtime, x, weight, 1e-5, form="values").float_rows()
    np.testing.assert_allclose(out, reference_ops.rms_norm(x, weight, 1e-5), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["both", "quants"])
@pytest.mark.parametrize("width", [32, 96, 896, 8224])
def test_rms_norm_quantized(runtime: _cpu.Runtime, rng: np.random.Generator, width: int, form: str) -> None:
    x = rng.standard_normal((17, width), np.float32)
    weight = rng.uniform(0.5, 2, width).astype(np.float32)
    values = native_ops.rms_norm(runtime, x, weight, 1e-6, form="values").float_rows()
    quantized = native_ops.rms_norm(runtime, x, weight, 1e-6, form=form).quantized_rows()
    assert_same_bits(quantized, reference_ops.quantize(values))


def test_rms_norm_of_chosen_rows(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((9, 64), np.float32), rng.standard_normal(64, np.float32)
    rows = np.array([8, 0, 3, 3], np.int32)
    chosen = native_ops.rms_norm(runtime, x, weight, 1e-6, rows).float_rows()
    np.testing.assert_array_equal(chosen, native_ops.rms_norm(runtime, x, weight, 1e-6).float_rows()[rows])


def test_rms_norm_has_the_same_bits_everywhere(
    every_runtime: list[_cpu.Runtime], rng: np.random.Generator
) -> None:
    x, weight = rng.standard_normal((40, 288), np.float32), rng.standard_normal(288, np.float32)
    first, *others = [native_ops.rms_norm(runtime, x, weight, 1e-6) for runtime in every_runtime]
    for other in others:
        np.testing.assert_array_equal(other.float_rows(), first.float_rows())
        assert_same_bits(other.quantized_rows(), first.quantized_rows())
    alone = native_ops.rms_norm(every_runtime[0], x[7:8].copy(), weight, 1e-6)
    np.testing.assert_array_equal(alone.float_rows(), first.float_rows()[7:8])


def quantized_by(runtime: _cpu.Runtime, values: np.ndarray) -> tuple[np.ndarray, reference_ops.Quantized]:
    """What a norm makes of the values (little, if they are small), and its quantized form."""
    out = native_ops.rms_norm(runtime, values[None, :], np.ones(values.size, np.float32), 1.0)
    return out.float_rows()[0], out.quantized_rows()


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=32, max_size=32))
@settings(max_examples=200, deadline=None)
def test_quantizer_follows_its_definition_for_any_values(values: list[float]) -> None:
    x = np.array(values, np.float32)
    for isa in _cpu.features():
        normalized, quantized = quantized_by(_cpu.Runtime(1, isa), x)
        expected = reference_ops.quantize(normalized[None, :])
        assert_same_bits(quantized, expected)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_quantizer_keeps_what_is_not_finite_visible(runtime: _cpu.Runtime, special: float) -> None:
    x = np.full(64, 1e-3, np.float32)
    x[40] = special
    _, quantized = quantized_by(runtime, x)
    assert np.isnan(quantized.scales).any()
    assert np.isnan(quantized.sums).any()
