"""Every operation on GPUs against numpy: the kernels of ``kernels/hip`` through `worker.kernel_set`.

On stand-in AMD GPUs the same sources run on the host, a fiber a lane; where there is an NVIDIA GPU, on that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
import pytest
import redshard_cpu
from support import reference_ops
from support.gguf_models import random_blocks
from support.gpu_memory import GpuMemory
from support.reference_ops import Quantized, Sampling

from loader.quant_types import QuantType
from worker import kernel_set
from worker.arguments import (
    Activation,
    Adjustment,
    AttentionArguments,
    EmbedArguments,
    MatmulArguments,
    Matrix,
    RmsNormArguments,
    RopeStoreArguments,
    SampleArguments,
    SamplingRow,
    Step,
    SwigluArguments,
)
from worker.device.gpu import GpuDevice
from worker.kernel_set import VECTOR_ROWS

FLOAT_TYPES = [QuantType.F32, QuantType.F16, QuantType.BF16]
BLOCK_TYPES = [QuantType.Q4_0, QuantType.Q8_0, QuantType.Q4_K, QuantType.Q6_K]
TYPES = FLOAT_TYPES + BLOCK_TYPES

every_type = pytest.mark.parametrize("quant_type", TYPES, ids=lambda t: t.name)


@pytest.fixture(autouse=True)
def _every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the tiles of large ones."""
    monkeypatch.setattr(kernel_set, "FULL_GRID", 1)


@pytest.fixture(scope="module")
def module_memory(gpu: GpuDevice) -> GpuMemory:
    return GpuMemory(gpu)


@pytest.fixture
def memory(module_memory: GpuMemory) -> GpuMemory:
    module_memory.clear()
    return module_memory


def dequantized(blocks: np.ndarray, quant_type: QuantType) -> np.ndarray:
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType(quant_type.ggml_id)).astype(np.float64)


def assert_close(ours: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> None:
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


@every_type
def test_embed(memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType) -> None:
    width, ids = 512, rng.integers(0, 70, 5).astype(np.int32)
    blocks = random_blocks(rng, quant_type, (70, width), 0.5)
    out = memory.room((9, width))
    arguments = EmbedArguments(
        memory.put_step(5), memory.put(ids), memory.put_matrix(blocks, quant_type), out.address, width, 1.5
    )
    memory.device.launch("embed", arguments, 8)
    expected = reference_ops.embed(dequantized(blocks, quant_type), ids, 1.5)
    np.testing.assert_allclose(memory.read_rows(out, 5), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["both", "values", "quants"])
@pytest.mark.parametrize("width", [32, 96, 800, 4096])
@pytest.mark.parametrize("over_outputs", [False, True])
def test_rms_norm(
    memory: GpuMemory, rng: np.random.Generator, form: str, width: int, over_outputs: bool
) -> None:
    x = rng.standard_normal((6, width), np.float32) * 3
    weight = rng.standard_normal(width, np.float32)
    rows = rng.permutation(6)[:4].astype(np.int32)
    out = memory.room_for_activation(8, width, form)
    arguments = RmsNormArguments(
        memory.put_step(6, 1, 4),
        memory.put(x),
        memory.put(rows) if over_outputs else 0,
        memory.put(weight),
        out.argument(),
        width,
        1e-5,
    )
    memory.device.launch("rms_norm", arguments, 8)
    expected = reference_ops.rms_norm(x[rows] if over_outputs else x, weight, 1e-5)
    if out.values:
        np.testing.assert_allclose(
            memory.read_rows(out.values, len(expected)), expected, rtol=2e-6, atol=2e-6
        )
    if out.quants:
        assert_quantized(memory.read_quantized(out, len(expected)), expected)


def test_rms_norm_of_an_odd_width(memory: GpuMemory, rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((3, 77), np.float32), rng.standard_normal(77, np.float32)
    out = memory.room_for_activation(3, 77, "values")
    arguments = RmsNormArguments(
        memory.put_step(3), memory.put(x), 0, memory.put(weight), out.argument(), 77, 1e-5
    )
    memory.device.launch("rms_norm", arguments, 3)
    assert out.values
    np.testing.assert_allclose(
        memory.read(out.values), reference_ops.rms_norm(x, weight, 1e-5), rtol=2e-6, atol=2e-6
    )


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
    redshard_cpu.Runtime(1).launch("matmul", bytes(on_cpu))
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


@pytest.mark.parametrize("neox", [0, 1])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "n_rot", "norms"),
    [(64, 64, 64, False), (128, 96, 40, True), (40, 24, 40, True)],
)
def test_rope_store(
    memory: GpuMemory,
    rng: np.random.Generator,
    neox: int,
    head_dim: int,
    value_dim: int,
    n_rot: int,
    norms: bool,
) -> None:
    n, n_heads, n_kv, block_size = 5, 6, 2, 16
    q = rng.standard_normal((n, n_heads, head_dim), np.float32)
    k = rng.standard_normal((n, n_kv, head_dim), np.float32)
    v = rng.standard_normal((n, n_kv, value_dim), np.float32)
    q_norm, k_norm = (rng.standard_normal(head_dim, np.float32) if norms else None for _ in range(2))
    positions = rng.integers(0, 100, n).astype(np.int32)
    slots = rng.permutation(4 * block_size)[:n].astype(np.int32)
    angle = rng.uniform(0, 2 * np.pi, (100, n_rot // 2))
    rotary = np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    turned = memory.room_holding(q)
    k_cache = memory.room((4, n_kv, block_size, head_dim), np.float16)
    v_cache = memory.room((4, n_kv, block_size, value_dim), np.float16)
    arguments = RopeStoreArguments(
        memory.put_step(n),
        memory.put(positions),
        memory.put(slots),
        turned.address,
        memory.put(k),
        memory.put(v),
        memory.put_optional(q_norm),
        memory.put_optional(k_norm),
        memory.put(rotary),
        k_cache.address,
        v_cache.address,
        n_heads,
        n_kv,
        head_dim,
        value_dim,
        n_rot,
        neox,
        block_size,
        1e-6,
    )
    memory.device.launch("rope_store", arguments, 8)
    if q_norm is not None and k_norm is not None:
        q, k = reference_ops.rms_norm(q, q_norm, 1e-6), reference_ops.rms_norm(k, k_norm, 1e-6)
    angles = rotary[positions]
    np.testing.assert_allclose(
        memory.read(turned), reference_ops.rotate(q, angles, bool(neox)), rtol=2e-5, atol=2e-5
    )
    keys = memory.read(k_cache).swapaxes(1, 2).reshape(4 * block_size, n_kv, head_dim)
    values = memory.read(v_cache).swapaxes(1, 2).reshape(4 * block_size, n_kv, value_dim)
    np.testing.assert_allclose(keys[slots], reference_ops.rotate(k, angles, bool(neox)), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(values[slots], v.astype(np.float16))
    others = np.setdiff1d(np.arange(4 * block_size), slots)
    assert (keys[others].view(np.uint16) == 0xFFFF).all()
    assert (values[others].view(np.uint16) == 0xFFFF).all()


@pytest.mark.parametrize(
    ("n_kv_heads", "group", "head_dim", "value_dim"),
    [(2, 1, 64, 64), (1, 4, 128, 128), (2, 9, 64, 64), (1, 2, 40, 24), (1, 3, 192, 128)],
)
@pytest.mark.parametrize(
    "sequences",
    [
        [range(299, 300)],
        [range(2400, 2401), range(1151, 1152)],
        [range(1), range(255, 256), range(256, 257), range(511, 512)],
        [range(70)],
        [range(250, 290), range(30, 31), range(3), range(600, 601)],
    ],
    ids=["decode", "decode long", "decode many", "prompt", "both"],
)
def test_attention(
    memory: GpuMemory,
    rng: np.random.Generator,
    sequences: list[range],
    n_kv_heads: int,
    group: int,
    head_dim: int,
    value_dim: int,
) -> None:
    block_size, n_heads = 16, n_kv_heads * group
    table_width = max(40, *(sequence.stop // block_size + 1 for sequence in sequences))
    blocks = rng.permutation(len(sequences) * table_width + 7)
    tables = blocks[: len(sequences) * table_width].reshape(len(sequences), table_width).astype(np.int32)
    shape = (len(blocks), n_kv_heads, block_size)
    keys = rng.standard_normal((*shape, head_dim), np.float32).astype(np.float16)
    values = rng.standard_normal((*shape, value_dim), np.float32).astype(np.float16)
    positions = np.array([p for sequence in sequences for p in sequence], np.int32)
    rows = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(s) for s in sequences])
    starts = np.cumsum([0, *(len(s) for s in sequences)], dtype=np.int32)
    n = len(positions)
    q = rng.standard_normal((n, n_heads, head_dim), np.float32)
    bound = next(rows for rows in memory.device.row_buckets(128) if rows >= n)
    context = table_width * block_size
    scratch = memory.room(
        (memory.device.scratch_bytes(bound, len(sequences), n_heads, value_dim, context) // 4,)
    )
    width = n_heads * value_dim
    out = memory.room_for_activation(bound, width, "both" if width % 32 == 0 else "values")
    arguments = AttentionArguments(
        memory.put_step(n, len(sequences)),
        memory.put(positions),
        memory.put(rows),
        memory.put(starts),
        memory.put(tables),
        memory.put(q),
        memory.put(keys),
        memory.put(values),
        out.argument(),
        scratch.address,
        scratch.nbytes,
        n_heads,
        n_kv_heads,
        head_dim,
        value_dim,
        block_size,
        table_width,
        head_dim**-0.5,
        len(sequences),
    )
    memory.device.launch("attention", arguments, bound)
    assert out.values
    result = memory.read_rows(out.values, n)
    memory.read(scratch)
    for t in range(n):
        used = tables[rows[t], : positions[t] // block_size + 1]
        own_keys, own_values = (
            cache[used].swapaxes(1, 2).reshape(-1, n_kv_heads, cache.shape[3]) for cache in (keys, values)
        )
        expected = reference_ops.attention(q[t], own_keys, own_values, int(positions[t]), head_dim**-0.5)
        single = len(sequences[rows[t]]) == 1
        assert_close(result[t], expected.reshape(-1), 2e-5 if single else 4e-3)
    if out.quants:
        assert_quantized(memory.read_quantized(out, n), result)


def sampled(
    memory: GpuMemory, logits: np.ndarray, rows: Sequence[Sampling], n_top: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, their log probabilities, the most probable tokens, theirs."""
    n, n_vocab = logits.shape
    packed, adjustments = (SamplingRow * n)(), []
    for entry, row in zip(packed, rows, strict=True):
        for name, _ in SamplingRow._fields_[:-2]:
            setattr(entry, name, getattr(row, name))
        entry.first_adjustment = len(adjustments)
        adjustments += [Adjustment(*each) for each in row.adjustments]
        entry.end_adjustment = len(adjustments)
    listed = bytes((Adjustment * len(adjustments))(*adjustments))
    outputs = [
        memory.room((n,), np.int32),
        memory.room((n,)),
        memory.room((n, max(1, n_top)), np.int32),
        memory.room((n, max(1, n_top))),
    ]
    arguments = SampleArguments(
        memory.put_step(n, n, n),
        memory.room_holding(logits).address,
        memory.put(np.frombuffer(bytes(packed), np.uint8)),
        memory.put(np.frombuffer(listed, np.uint8)),
        *(output.address for output in outputs),
        n_vocab,
        n_top,
    )
    memory.device.launch("sample", arguments, n)
    tokens, logprobs, top_tokens, top_logprobs = (memory.read(output) for output in outputs)
    return tokens, logprobs, top_tokens[:, :n_top], top_logprobs[:, :n_top]


@pytest.mark.parametrize("n_vocab", [1, 17, 4096, 40_001])
def test_greedy_sampling_and_logprobs(memory: GpuMemory, rng: np.random.Generator, n_vocab: int) -> None:
    logits = (rng.standard_normal((2, n_vocab)) * 3).astype(np.float32)
    n_top = min(5, n_vocab)
    tokens, logprobs, top_tokens, top_logprobs = sampled(memory, logits, [Sampling()] * 2, n_top)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    for row in range(2):
        expected = reference_ops.logprobs(logits[row])
        best = np.argsort(-logits[row], kind="stable")[:n_top]
        np.testing.assert_allclose(logprobs[row], expected[tokens[row]], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(top_tokens[row], best)
        np.testing.assert_allclose(top_logprobs[row], expected[best], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.75},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.3},
    ],
    ids=str,
)
def test_draws_are_the_reference_draws(
    memory: GpuMemory, rng: np.random.Generator, settings: dict[str, Any]
) -> None:
    n, n_vocab = 6, 3000
    logits = (rng.standard_normal((n, n_vocab)) * 2).astype(np.float32)
    adjustments = [(int(t), 2, 1, 0.5) for t in rng.permutation(n_vocab)[:9]]
    rows = [
        Sampling(seed=int(rng.integers(1 << 63)), draw=i, adjustments=adjustments, **settings)
        for i in range(n)
    ]
    tokens = sampled(memory, logits, rows)[0]
    for token, row, own in zip(tokens, rows, logits, strict=True):
        if token == reference_ops.sample(own, row):
            continue
        probabilities = reference_ops.distribution(reference_ops.adjust(own, row), row)
        end, random = np.cumsum(probabilities)[token], reference_ops.uniform(row.seed, row.draw)
        assert end - probabilities[token] - 1e-4 <= random <= end + 1e-4, "not even by rounding"
