"""Matrix products on GPUs, alone and in SwiGLU, against numpy: ``kernels/hip`` through `worker.kernel_set`.

On stand-in AMD GPUs the same sources run on the host, a fiber a lane; where there is an NVIDIA GPU, on that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import reference_ops
from support.comparisons import (
    BLOCK_TYPES,
    FLOAT_TYPES,
    GPU_TYPES,
    assert_close,
    assert_quantized,
    dequantized,
)
from support.gguf_models import random_blocks
from support.gpu_memory import GpuMemory

import redshard._cpu as _cpu
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device import kernel_set
from redshard.worker.device.arguments import (
    Activation,
    MatmulArguments,
    Matrix,
    Step,
    SwigluArguments,
)
from redshard.worker.device.kernel_set import VECTOR_ROWS

every_type = pytest.mark.parametrize("quant_type", GPU_TYPES, ids=lambda t: t.name)


@pytest.fixture(autouse=True)
def _every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the tiles of large ones."""
    monkeypatch.setattr(kernel_set, "FULL_GRID", 1)


class Products:
    """One activation and some matrices, on the GPU and in numpy.

    Rows of activations may be multiplied by `magnitudes`; there is no bias then, for it would hide the small.
    """

    def __init__(
        self,
        memory: GpuMemory,
        rng: np.random.Generator,
        rows: int,
        width: int,
        types: Sequence[QuantType],
        magnitudes: np.ndarray | None = None,
    ) -> None:
        self.values = rng.standard_normal((rows, width), np.float32)
        if magnitudes is not None:
            self.values *= magnitudes.astype(np.float32)[:, None]
        self.quantized = reference_ops.quantize(self.values) if width % 32 == 0 else None
        self.x: Activation = memory.put_activation(self.values, self.quantized)
        self.heights = [int(rng.integers(33, 150)) for _ in types]
        self.matrices, self.expected, self.tolerance = [], [], []
        for height, quant_type in zip(self.heights, types, strict=True):
            blocks = random_blocks(rng, quant_type, (height, width), width**-0.5)
            bias = rng.standard_normal(height, np.float32) if magnitudes is None else None
            self.matrices.append(memory.put_matrix(blocks, quant_type, bias))
            x: Any = self.values if quant_type in FLOAT_TYPES else self.quantized
            w = dequantized(blocks, quant_type)
            self.expected.append(reference_ops.matmul(x, w, bias))
            # Many rows meet floats as float16: two roundings a product.
            rounding = 2.0**-10 if quant_type in FLOAT_TYPES and rows not in VECTOR_ROWS else 1e-6
            spare = 1e-5 * (1 if magnitudes is None else np.abs(magnitudes)[:, None])
            self.tolerance.append(rounding * (np.abs(self.values) @ np.abs(w).T) + spare)


class Moved(Products):
    """The same products with other rows of activations around each: those in `order`."""

    def __init__(self, memory: GpuMemory, products: Products, order: np.ndarray) -> None:
        self.values, self.matrices = products.values[order], products.matrices
        self.x = memory.put_activation(self.values, reference_ops.quantize(self.values))


def width_for(types: Sequence[QuantType], width: int) -> int:
    block = max(quant_type.block_elements for quant_type in types)
    return -(-width // block) * block


def multiply(
    memory: GpuMemory,
    products: Products,
    rows: int,
    *,
    bound: int | None = None,
    before: Sequence[np.ndarray] | None = None,
    n_outputs: int = 0,
) -> list[np.ndarray]:
    """The products of the step's rows by launches for `bound` rows, added to `before` where given."""
    bound = bound or rows
    arguments = MatmulArguments()
    arguments.step, arguments.x = memory.put_step(rows, 1, n_outputs), products.x
    if before is None:
        outputs = [memory.room((bound, matrix.n_rows)) for matrix in products.matrices]
    else:
        outputs = [memory.room_holding(values) for values in before]
    for m, (matrix, output) in enumerate(zip(products.matrices, outputs, strict=True)):
        arguments.w[m], arguments.y[m] = matrix, output.address
    arguments.n_matrices = len(outputs)
    arguments.width = products.values.shape[1]
    arguments.accumulate = before is not None
    arguments.over_outputs = n_outputs > 0
    memory.device.launch("matmul", arguments, bound)
    return [memory.read_rows(output, n_outputs or rows) for output in outputs]


@every_type
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 16, 20, 33, 64, 130])
def test_matmul(memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, rows: int) -> None:
    products = Products(
        memory, rng, rows, width_for([quant_type], 32 * int(rng.integers(1, 30))), [quant_type]
    )
    (result,) = multiply(memory, products, rows)
    assert_close(result, products.expected[0], products.tolerance[0])


@pytest.mark.parametrize("quant_type", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [12, 32, 64, 70])
def test_matmul_of_many_columns(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, rows: int
) -> None:
    """So many that every wave stages several times."""
    products = Products(memory, rng, rows, 2816, [quant_type])
    (result,) = multiply(memory, products, rows)
    assert_close(result, products.expected[0], products.tolerance[0])


#: Magnitudes of activations, repeated over the rows: far above and below what float16 holds.
MAGNITUDES = {
    "large": [1e5],
    "small": [1e-6],
    "neighbours": [1e5, 1e-6],
    "extremes": [1e30, 1e-25, 1.0, 0.0],
}
far_from_one = pytest.mark.parametrize("magnitudes", MAGNITUDES.values(), ids=MAGNITUDES)
some_types = pytest.mark.parametrize(
    "quant_type", [QuantType.BF16, QuantType.Q8_0, QuantType.Q4_K], ids=lambda t: t.name
)


@some_types
@far_from_one
@pytest.mark.parametrize("rows", [8, 20, 40, 70])
def test_matmul_of_rows_of_any_magnitude(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, magnitudes: list[float], rows: int
) -> None:
    products = Products(memory, rng, rows, 512, [quant_type], np.resize(magnitudes, rows))
    (result,) = multiply(memory, products, rows)
    assert_close(result, products.expected[0], np.maximum(products.tolerance[0], np.finfo(np.float32).tiny))


@some_types
@pytest.mark.parametrize("rows", [8, 20, 40])
def test_what_is_not_finite_stays_in_its_row(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, rows: int
) -> None:
    products = Products(memory, rng, rows, 512, [quant_type])
    (expected,) = multiply(memory, products, rows)
    products.values[2, 300], products.values[4, 5] = np.nan, -np.inf
    products.x = memory.put_activation(products.values, reference_ops.quantize(products.values))
    (result,) = multiply(memory, products, rows)
    others = np.setdiff1d(np.arange(rows), [2, 4])
    assert np.isnan(result[2]).all()
    assert not np.isfinite(result[4]).any()
    np.testing.assert_array_equal(result[others], expected[others])


@pytest.mark.parametrize("quant_type", FLOAT_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (2, 100), (40, 77)])
def test_float_weights_of_any_width(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, rows: int, width: int
) -> None:
    products = Products(memory, rng, rows, width, [quant_type])
    (result,) = multiply(memory, products, rows)
    assert_close(result, products.expected[0], products.tolerance[0])


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_three_matrices_of_different_types(memory: GpuMemory, rng: np.random.Generator, rows: int) -> None:
    products = Products(memory, rng, rows, 512, [QuantType.Q4_K, QuantType.Q6_K, QuantType.Q4_K])
    results = multiply(memory, products, rows)
    for result, expected, tolerance in zip(results, products.expected, products.tolerance, strict=True):
        assert_close(result, expected, tolerance)


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_matmul_adds_to_what_is_there(memory: GpuMemory, rng: np.random.Generator, rows: int) -> None:
    products = Products(memory, rng, rows, 256, [QuantType.Q8_0])
    before = rng.standard_normal((rows, products.heights[0]), np.float32)
    (result,) = multiply(memory, products, rows, before=[before])
    assert_close(result, before + products.expected[0], products.tolerance[0])


@pytest.mark.parametrize(("rows", "bound"), [(1, 8), (5, 8), (9, 32), (30, 70)])
def test_rows_that_the_step_does_not_have_are_left_alone(
    memory: GpuMemory, rng: np.random.Generator, rows: int, bound: int
) -> None:
    products = Products(memory, rng, bound, 256, [QuantType.Q4_0])
    (result,) = multiply(memory, products, rows, bound=bound)
    assert_close(result, products.expected[0][:rows], products.tolerance[0][:rows])
    (result,) = multiply(memory, products, bound, bound=bound, n_outputs=rows)
    assert_close(result, products.expected[0][:rows], products.tolerance[0][:rows])


@every_type
def test_a_row_does_not_depend_on_the_others(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType
) -> None:
    """Nor on its place; vector kernels add up alike for every number of rows."""
    products = Products(memory, rng, 140, 512, [quant_type])
    alone = [
        multiply(memory, Moved(memory, products, np.roll(np.arange(140), -row)), 1)[0] for row in range(8)
    ]
    for rows in range(1, 9):
        (together,) = multiply(memory, products, rows, bound=next(n for n in VECTOR_ROWS if n >= rows))
        np.testing.assert_array_equal(together, np.concatenate(alone[:rows]))
    order = np.roll(np.arange(140), 3)
    for bound in (16, 32, 64, 140):
        (before,) = multiply(memory, products, bound - 5, bound=bound)
        moved = Moved(memory, products, order)
        (after,) = multiply(memory, moved, bound - 2, bound=bound)
        np.testing.assert_array_equal(after[3:], before)


@pytest.mark.parametrize("quant_type", BLOCK_TYPES, ids=lambda t: t.name)
def test_the_largest_tiles_have_the_numbers_of_the_cpu(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType
) -> None:
    """Bit for bit: the same exact integer products, scaled and added in the same order."""
    rows, height, width = 70, 45, width_for([quant_type], 32 * int(rng.integers(5, 40)))
    values = rng.standard_normal((rows, width), np.float32)
    x = reference_ops.quantize(values)
    blocks = np.ascontiguousarray(random_blocks(rng, quant_type, (height, width), width**-0.5))
    output = memory.room((rows, height))
    arguments = MatmulArguments(memory.put_step(rows), memory.put_activation(values, x))
    arguments.w[0], arguments.y[0] = memory.put_matrix(blocks, quant_type), output.address
    arguments.n_matrices, arguments.width = 1, width
    memory.device.launch("matmul", arguments, rows)

    step, expected = Step(rows, 1, 0, 0), np.empty((rows, height), np.float32)
    on_cpu = MatmulArguments(ctypes.addressof(step))
    on_cpu.x = Activation(0, x.quants.ctypes.data, x.scales.ctypes.data, x.sums.ctypes.data)
    on_cpu.w[0] = Matrix(blocks.ctypes.data, 0, quant_type.ggml_id, height)
    on_cpu.y[0], on_cpu.n_matrices, on_cpu.width = expected.ctypes.data, 1, width
    _cpu.Runtime(1).launch("matmul", bytes(on_cpu))
    np.testing.assert_array_equal(memory.read_rows(output, rows), expected)


@every_type
@pytest.mark.parametrize(
    ("rows", "hidden"), [(1, 64), (2, 96), (4, 32), (8, 160), (20, 96), (50, 64), (130, 96)]
)
def test_swiglu(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, rows: int, hidden: int
) -> None:
    _check_swiglu(memory, rng, quant_type, rows, hidden, "both")


@pytest.mark.parametrize("rows", [1, 20, 70])
def test_swiglu_of_an_odd_hidden_width(memory: GpuMemory, rng: np.random.Generator, rows: int) -> None:
    _check_swiglu(memory, rng, QuantType.Q8_0, rows, 45, "values")


@some_types
@far_from_one
@pytest.mark.parametrize("rows", [8, 20, 40])
def test_swiglu_of_rows_of_any_magnitude(
    memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType, magnitudes: list[float], rows: int
) -> None:
    magnitudes = [min(magnitude, 1e15) for magnitude in magnitudes]  # the result has their squares
    _check_swiglu(memory, rng, quant_type, rows, 96, "values", np.resize(magnitudes, rows))


def _check_swiglu(
    memory: GpuMemory,
    rng: np.random.Generator,
    quant_type: QuantType,
    rows: int,
    hidden: int,
    form: str,
    magnitudes: np.ndarray | None = None,
) -> None:
    """Rows of activations may be multiplied by `magnitudes`; there is no bias then."""
    width = width_for([quant_type], 736)
    values = rng.standard_normal((rows, width), np.float32)
    if magnitudes is not None:
        values *= magnitudes.astype(np.float32)[:, None]
    quantized = reference_ops.quantize(values)
    blocks = [random_blocks(rng, quant_type, (hidden, width), width**-0.5) for _ in range(2)]
    bias = rng.standard_normal(hidden, np.float32) if magnitudes is None else None
    out = memory.room_for_activation(rows + 1, hidden, form)
    arguments = SwigluArguments(
        memory.put_step(rows),
        memory.put_activation(values, quantized),
        memory.put_matrix(blocks[0], quant_type, bias),
        memory.put_matrix(blocks[1], quant_type),
        out.argument(),
        width,
    )
    memory.device.launch("swiglu", arguments, rows)
    x: Any = values if quant_type in FLOAT_TYPES else quantized
    gate, up = (dequantized(each, quant_type) for each in blocks)
    with np.errstate(over="ignore"):
        expected = reference_ops.swiglu(x, gate, up, bias)
    assert out.values
    result = memory.read_rows(out.values, rows)
    rounding = 2e-5 if rows in (1, 2, 4, 8) else 4e-3
    # float32 holds nothing below 1e-38, as the square of the smallest magnitude is
    missed = np.linalg.norm(result - expected, axis=1)
    assert (missed <= rounding * np.linalg.norm(expected, axis=1) + 1e-36).all()
    if form == "both":
        assert_quantized(memory.read_quantized(out, rows), result)
