"""`matmul` and `swiglu` of the CPU device on every instruction set, against float64 products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from support.gguf_models import random_blocks

import redshard._cpu as _cpu
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import Activation, MatmulArguments, Matrix, Step, SwigluArguments

FLOAT_TYPES = [QuantType.F32, QuantType.F16, QuantType.BF16]
#: Where the codes are in a block of each quantized type.
CODE_BYTES = {
    QuantType.Q4_0: (2, 18),
    QuantType.Q4_1: (4, 20),
    QuantType.Q5_0: (2, 22),
    QuantType.Q5_1: (4, 24),
    QuantType.Q8_0: (2, 34),
    QuantType.Q4_K: (16, 144),
    QuantType.Q5_K: (16, 176),
    QuantType.Q6_K: (0, 192),
}
BLOCK_TYPES = list(CODE_BYTES)
TYPES = FLOAT_TYPES + BLOCK_TYPES
ISAS = _cpu.features()
POISON = np.float32(1e30)
GUARD = 64  # elements before and behind every output


@dataclass
class QuantizedRows:
    """Rows of activations, freely invented in their quantized form and as float32."""

    values: np.ndarray  # float32 (rows, width)
    quants: np.ndarray  # int8 (rows, width)
    scales: np.ndarray  # float32 (rows, width / 32)
    sums: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, rows: int, width: int) -> QuantizedRows:
        values = rng.standard_normal((rows, width), np.float32)
        blocks = width // 32  # a width that is no multiple of 32 is for float weights alone
        quants = rng.integers(-127, 128, (rows, blocks, 32)).astype(np.int8)
        scales = rng.uniform(0.001, 0.02, (rows, blocks)).astype(np.float32)
        return cls.from_quants(values, quants, scales)

    @classmethod
    def from_quants(cls, values: np.ndarray, quants: np.ndarray, scales: np.ndarray) -> QuantizedRows:
        sums = scales * quants.sum(axis=2, dtype=np.int32).astype(np.float32)
        return cls(values, quants.reshape(len(quants), -1), scales, sums)

    def seen_by(self, quant_type: QuantType) -> np.ndarray:
        """What a matrix of this type multiplies, float64 (rows, width)."""
        if quant_type in FLOAT_TYPES:
            return self.values.astype(np.float64)
        return self.quants * np.repeat(self.scales, 32, axis=1).astype(np.float64)

    def part(self, begin: int, end: int) -> QuantizedRows:
        rows = slice(begin, end)
        return QuantizedRows(self.values[rows], self.quants[rows], self.scales[rows], self.sums[rows])

    def argument(self) -> Activation:
        fields = (self.values, self.quants, self.scales, self.sums)
        return Activation(*(field.ctypes.data for field in fields))


@dataclass
class Weights:
    """A matrix of random blocks that ends where its memory ends, with or without a bias."""

    blocks: np.ndarray  # uint8 (rows, bytes per row)
    quant_type: QuantType
    bias: np.ndarray | None

    @classmethod
    def random(
        cls, rng: np.random.Generator, quant_type: QuantType, rows: int, width: int, bias: bool = False
    ) -> Weights:
        blocks = np.ascontiguousarray(random_blocks(rng, quant_type, (rows, width), width**-0.5))
        return cls(blocks, quant_type, rng.standard_normal(rows, np.float32) if bias else None)

    @property
    def n_rows(self) -> int:
        return len(self.blocks)

    def values(self) -> np.ndarray:
        ggml_type = gguf.GGMLQuantizationType(self.quant_type.ggml_id)
        return gguf.dequantize(self.blocks, ggml_type).astype(np.float64)

    def argument(self) -> Matrix:
        bias = 0 if self.bias is None else self.bias.ctypes.data
        return Matrix(self.blocks.ctypes.data, bias, self.quant_type.ggml_id, self.n_rows)

    def product(self, x: QuantizedRows) -> tuple[np.ndarray, np.ndarray]:
        """(x w^T + bias, the tolerance of each element)."""
        w, seen = self.values(), x.seen_by(self.quant_type)
        tolerance = 1e-6 * (np.abs(seen) @ np.abs(w).T) + 1e-6
        return seen @ w.T + (0 if self.bias is None else self.bias), tolerance


class Guarded:
    """A poisoned output between guard zones."""

    def __init__(self, shape: tuple[int, ...], dtype: type = np.float32, poison: float = POISON) -> None:
        self._poison = dtype(poison)
        self._memory = np.full(GUARD + int(np.prod(shape)) + GUARD, self._poison, dtype)
        self.array = self._memory[GUARD:-GUARD].reshape(shape)

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def checked(self) -> np.ndarray:
        for guard in (self._memory[:GUARD], self._memory[-GUARD:]):
            np.testing.assert_array_equal(guard, self._poison)
        return self.array


def matmul(
    runtime: _cpu.Runtime,
    x: QuantizedRows,
    matrices: Sequence[Weights],
    *,
    before: Sequence[np.ndarray] | None = None,
    outputs_only: int | None = None,
) -> list[np.ndarray]:
    """The products; added to `before` where given, or of the first `outputs_only` rows alone."""
    rows = len(x.values) if outputs_only is None else outputs_only
    outputs = [Guarded((rows, w.n_rows)) for w in matrices]
    if before is not None:
        for output, values in zip(outputs, before, strict=True):
            output.array[:] = values
    step = Step(len(x.values), 1, rows, 0)
    arguments = MatmulArguments()
    arguments.step = ctypes.addressof(step)
    arguments.x = x.argument()
    for m, (w, output) in enumerate(zip(matrices, outputs, strict=True)):
        arguments.w[m] = w.argument()
        arguments.y[m] = output.address
    arguments.n_matrices = len(matrices)
    arguments.width = x.values.shape[1]
    arguments.accumulate = before is not None
    arguments.over_outputs = outputs_only is not None
    runtime.launch("matmul", bytes(arguments))
    return [output.checked() for output in outputs]


def assert_product(result: np.ndarray, expected: tuple[np.ndarray, np.ndarray]) -> None:
    values, tolerance = expected
    assert np.all(np.abs(result - values) <= tolerance), np.max(np.abs(result - values) / tolerance)


def width_of(quant_type: QuantType, width: int) -> int:
    """`width` rounded up to whole blocks."""
    return -(-width // quant_type.block_elements) * quant_type.block_elements


@pytest.fixture(scope="module")
def runtimes() -> dict[tuple[str, int], _cpu.Runtime]:
    return {(isa, n): _cpu.Runtime(n, isa) for isa in ISAS for n in (1, 2, 3)}


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 16, 33, 150])
def test_product_is_right_and_the_same_everywhere(runtimes, rng, quant_type, rows) -> None:
    n_rows, width = int(rng.integers(33, 130)), width_of(quant_type, int(rng.integers(1, 1300)))
    x, w = QuantizedRows.random(rng, rows, width), Weights.random(rng, quant_type, n_rows, width, bias=True)
    results = {key: matmul(runtime, x, [w])[0] for key, runtime in runtimes.items()}
    first = next(iter(results.values()))
    assert_product(first, w.product(x))
    for key, result in results.items():
        np.testing.assert_array_equal(result, first, err_msg=str(key))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("n_rows", [1, 3, 8, 15, 16, 17, 31, 32, 33, 40, 63, 65, 100])
def test_any_number_of_weight_rows(runtimes, rng, isa, quant_type, n_rows) -> None:
    width = width_of(quant_type, 96)
    x, w = QuantizedRows.random(rng, 5, width), Weights.random(rng, quant_type, n_rows, width)
    assert_product(matmul(runtimes[isa, 1], x, [w])[0], w.product(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant_type", FLOAT_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 31, 127, 128, 129, 260])
def test_float_weights_of_any_width(runtimes, rng, isa, quant_type, width) -> None:
    x, w = QuantizedRows.random(rng, 9, width), Weights.random(rng, quant_type, 37, width)
    assert_product(matmul(runtimes[isa, 1], x, [w])[0], w.product(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)
def test_a_row_does_not_depend_on_the_others(runtimes, rng, isa, quant_type) -> None:
    width = width_of(quant_type, 2080)
    x, w = QuantizedRows.random(rng, 140, width), Weights.random(rng, quant_type, 48, width)
    together = matmul(runtimes[isa, 2], x, [w])[0]
    for begin, end in [(0, 1), (1, 3), (3, 7), (7, 12), (12, 29), (29, 140)]:
        part = matmul(runtimes[isa, 1], x.part(begin, end), [w])[0]
        np.testing.assert_array_equal(part, together[begin:end])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_three_matrices_of_different_types(runtimes, rng, isa, rows) -> None:
    x = QuantizedRows.random(rng, rows, 512)
    matrices = [
        Weights.random(rng, QuantType.Q4_K, 80, 512, bias=True),
        Weights.random(rng, QuantType.Q6_K, 40, 512),
        Weights.random(rng, QuantType.BF16, 33, 512, bias=True),
    ]
    for result, w in zip(matmul(runtimes[isa, 3], x, matrices), matrices, strict=True):
        assert_product(result, w.product(x))
        np.testing.assert_array_equal(result, matmul(runtimes[isa, 1], x, [w])[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bias", [False, True])
def test_accumulate_adds_to_the_output(runtimes, rng, isa, bias) -> None:
    x, w = QuantizedRows.random(rng, 7, 64), Weights.random(rng, QuantType.Q4_0, 70, 64, bias)
    before = rng.standard_normal((7, 70), np.float32)
    (product,) = matmul(runtimes[isa, 1], x, [w])
    (result,) = matmul(runtimes[isa, 2], x, [w], before=[before])
    np.testing.assert_array_equal(result, before + product)


@pytest.mark.parametrize("isa", ISAS)
def test_over_outputs_multiplies_that_many_rows(runtimes, rng, isa) -> None:
    x, w = QuantizedRows.random(rng, 9, 64), Weights.random(rng, QuantType.Q8_0, 64, 64)
    (result,) = matmul(runtimes[isa, 1], x, [w], outputs_only=4)
    np.testing.assert_array_equal(result, matmul(runtimes[isa, 1], x, [w])[0][:4])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quant_type", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("code_byte", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("quant", [-127, 127])
def test_extreme_codes_do_not_overflow(runtimes, rng, isa, quant_type, code_byte, quant) -> None:
    """Every code byte alike and the largest activations: no sum may leave the 16 bits it is kept in."""
    w = Weights.random(rng, quant_type, 32, 256)
    blocks = w.blocks.reshape(-1, quant_type.block_bytes)
    begin, end = CODE_BYTES[quant_type]
    blocks[:, begin:end] = code_byte
    quants = np.full((3, 8, 32), quant, np.int8)
    x = QuantizedRows.from_quants(np.zeros((3, 256), np.float32), quants, np.full((3, 8), 0.01, np.float32))
    assert_product(matmul(runtimes[isa, 1], x, [w])[0], w.product(x))


@pytest.mark.parametrize("quant_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_an_activation_of_zeros_gives_the_bias(runtimes, rng, quant_type) -> None:
    w = Weights.random(rng, quant_type, 40, 256, bias=True)
    x = QuantizedRows.from_quants(
        np.zeros((4, 256), np.float32), np.zeros((4, 8, 32), np.int8), np.zeros((4, 8), np.float32)
    )
    for runtime in runtimes.values():
        np.testing.assert_array_equal(matmul(runtime, x, [w])[0], np.tile(w.bias, (4, 1)))


def test_a_step_without_rows_writes_nothing(runtimes, rng) -> None:
    x, w = QuantizedRows.random(rng, 1, 64), Weights.random(rng, QuantType.Q8_0, 32, 64)
    for runtime in runtimes.values():
        assert matmul(runtime, x, [w], outputs_only=0)[0].size == 0


def swiglu(
    runtime: _cpu.Runtime, x: QuantizedRows, gate: Weights, up: Weights, quantized: bool
) -> list[np.ndarray]:
    """[values] or [values, quants, scales, sums]."""
    rows, hidden = len(x.values), gate.n_rows
    outputs = [Guarded((rows, hidden))]
    if quantized:
        outputs.append(Guarded((rows, hidden), np.int8, 77))
        outputs += [Guarded((rows, hidden // 32)) for _ in range(2)]
    step = Step(rows, 1, 1, 0)
    arguments = SwigluArguments()
    arguments.step = ctypes.addressof(step)
    arguments.x = x.argument()
    arguments.gate, arguments.up = gate.argument(), up.argument()
    arguments.out = Activation(*(output.address for output in outputs))
    arguments.width = x.values.shape[1]
    runtime.launch("swiglu", bytes(arguments))
    return [output.checked() for output in outputs]


@pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (4, 128), (37, 96), (5, 45)])
def test_swiglu(runtimes, rng, quant_type, rows, hidden) -> None:
    width = width_of(quant_type, 224)
    x = QuantizedRows.random(rng, rows, width)
    gate, up = (Weights.random(rng, quant_type, hidden, width, bias) for bias in (True, False))
    results = {key: swiglu(runtime, x, gate, up, hidden % 32 == 0) for key, runtime in runtimes.items()}

    (g, g_tolerance), (u, u_tolerance) = gate.product(x), up.product(x)
    expected = g / (1 + np.exp(-g)) * u
    tolerance = 1.2 * (g_tolerance * np.abs(u) + u_tolerance * np.abs(g)) + 1e-6 * np.abs(expected) + 1e-6
    for key, (values, *quantized) in results.items():
        assert_product(values, (expected, tolerance))
        if quantized:
            quants, scales, sums = quantized
            error = np.abs(quants * np.repeat(scales, 32, axis=1) - values)
            assert np.all(error <= 0.51 * np.repeat(scales, 32, axis=1) + 1e-6)
            block_sums = scales * quants.reshape(rows, -1, 32).sum(axis=2, dtype=np.int32).astype(np.float32)
            np.testing.assert_array_equal(sums, block_sums)
        if key[0] != "portable":  # without a fused multiply-add its exponential differs in the last bit
            np.testing.assert_array_equal(values, results[ISAS[-1], 1][0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"width": 0}, "width"),
        ({"width": 48}, "whole number"),
        ({"n_matrices": 4}, "1 to 3"),
        ({"n_matrices": 2}, "empty weight matrix"),
        ({"step": None}, "no step"),
        ({"x": Activation()}, "quantized activations"),
        ({"type": 24}, "unsupported type"),
        ({"type": QuantType.F32.ggml_id, "x": Activation()}, "float activations"),
    ],
)
def test_bad_arguments_are_refused(runtimes, rng, change, problem) -> None:
    x, w = QuantizedRows.random(rng, 1, 64), Weights.random(rng, QuantType.Q8_0, 32, 64)
    step, out = Step(1, 1, 1, 0), Guarded((1, 32))
    arguments = MatmulArguments()
    arguments.step, arguments.x = ctypes.addressof(step), x.argument()
    arguments.w[0], arguments.y[0] = w.argument(), out.address
    arguments.n_matrices, arguments.width = 1, 64
    for field, value in change.items():
        setattr(arguments.w[0] if field == "type" else arguments, field, value)
    with pytest.raises(ValueError, match=problem):
        runtimes[ISAS[0], 1].launch("matmul", bytes(arguments))
