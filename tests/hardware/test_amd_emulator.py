"""Every kernel of kernels/hip in every weight format, as machine code of three AMD architectures, against
numpy.

Needs a checkout with the emulator, named by AMD_EMULATOR: see README.md here.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
from support import native_ops, reference_ops
from support.attention_cases import expected, random_cache
from support.comparisons import FLOAT_TYPES, GPU_TYPES
from support.gguf_models import random_blocks
from support.native_ops import Guarded, Output
from support.reference_ops import Quantized, Sampling

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device import kernel_set
from redshard.worker.device.arguments import Activation, MatmulArguments, Matrix, Step, SwigluArguments
from redshard.worker.device.base import BlockRun
from redshard.worker.device.kernel_set import PLANES, VECTOR_ROWS, attention_scratch_bytes, split_planes

pytest.importorskip("elftools", reason="pyelftools is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")

from hardware.compiler import compiler
from hardware.emulator import ARCHITECTURES, EmulatedGpu, emulator_directory
from hardware.tables import KERNELS, EmulatedTable, listed_kernels

pytestmark = [
    pytest.mark.skipif(not emulator_directory(), reason="AMD_EMULATOR names no checkout with the emulator"),
    pytest.mark.skipif(not compiler(), reason="clang-19 is not installed"),
    pytest.mark.timeout(900),
]

#: Relative errors that a kernel may have: float32 sums, or operands rounded to float16 for the matrix unit.
FLOAT32, FLOAT16 = 2e-6, 1e-3
#: Error that a log probability may have, in proportion to 1 + its size: the logarithm of a sum near 1 is near
#: 0, and as wrong as the sum. 41 roundings by up to 2^-24 where all go the same way, one an addition to the
#: sum of exponentials (5 a thread, 5 over lanes, 31 over waves), and 9 for exponentials, logarithm (1 ulp on
#: GPUs) and the products and differences around them.
LOG_PROBABILITY = 50 * 2**-24


@pytest.fixture(autouse=True)
def _every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the tiles of large ones."""
    monkeypatch.setattr(kernel_set, "FULL_GRID", 1)


@pytest.fixture(scope="module")
def table() -> Iterator[EmulatedTable]:
    table = EmulatedTable()
    yield table
    table.write_where_wanted()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def module_gpu(request: pytest.FixtureRequest) -> EmulatedGpu:
    return EmulatedGpu(request.param)


@pytest.fixture
def gpu(module_gpu: EmulatedGpu) -> Iterator[EmulatedGpu]:
    """A GPU that has launched nothing yet, with what it has compiled."""
    module_gpu.launched.clear()
    yield module_gpu
    module_gpu.bucket = None


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed of this test's random numbers: {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


@dataclass(frozen=True)
class Weights:
    """Random rows as stored, as the kernels want them, and what they mean, float64 (n_rows, width)."""

    quant_type: QuantType
    blocks: np.ndarray
    planes: np.ndarray
    values: np.ndarray

    @classmethod
    def random(cls, rng: np.random.Generator, quant_type: QuantType, n_rows: int, width: int) -> Weights:
        blocks = np.ascontiguousarray(random_blocks(rng, quant_type, (n_rows, width), width**-0.5))
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType(quant_type.ggml_id)).astype(np.float64)
        return cls(quant_type, blocks, in_planes(blocks, quant_type), values)

    def argument(self, bias: np.ndarray | None) -> Matrix:
        bias_address = 0 if bias is None else bias.ctypes.data
        return Matrix(self.planes.ctypes.data, bias_address, self.quant_type.ggml_id, len(self.values))


def in_planes(blocks: np.ndarray, quant_type: QuantType) -> np.ndarray:
    """The bytes of GGUF blocks, of each field the values of all blocks together; same shape."""
    if quant_type not in PLANES:
        return blocks
    whole = blocks.reshape(-1, quant_type.block_bytes)
    fields = [whole[:, offset : offset + nbytes].ravel() for offset, nbytes in PLANES[quant_type]]
    return np.concatenate(fields).reshape(blocks.shape)


@dataclass(frozen=True)
class Rows:
    """Random activations of a magnitude, or one each row, in all forms.

    Rows of a launch that the step does not have are poison.
    """

    n: int
    values: np.ndarray
    quants: np.ndarray
    scales: np.ndarray
    sums: np.ndarray

    @classmethod
    def random(
        cls, rng: np.random.Generator, n: int, bucket: int, width: int, magnitudes: np.ndarray | float = 1.0
    ) -> Rows:
        values = np.full((bucket, width), np.nan, np.float32)
        values[:n] = (rng.standard_normal((n, width), np.float32).T * magnitudes).T
        if width % 32:
            empty = np.empty(0, np.float32)
            return cls(n, values, empty.view(np.int8), empty, empty)
        exact = reference_ops.quantize(values)
        return cls(n, values, exact.quants, exact.scales, exact.sums)

    def argument(self) -> Activation:
        return Activation(*(part.ctypes.data for part in (self.values, self.quants, self.scales, self.sums)))

    def seen_by(self, quant_type: QuantType) -> np.ndarray | Quantized:
        if quant_type in FLOAT_TYPES:
            return self.values[: self.n]
        return Quantized(self.quants[: self.n], self.scales[: self.n], self.sums[: self.n])


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root of the summed squares of the differences, in proportion to that of what is wanted."""
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-30))


def quantization_error(out: Output, wanted: np.ndarray) -> float:
    """Of the float rows; the 8-bit rows must be their exact quantization."""
    values, quantized = out.float_rows(), out.quantized_rows()
    exact = reference_ops.quantize(values)
    assert np.abs(quantized.quants.astype(int) - exact.quants).max() <= 1  # 127 / x may be rounded otherwise
    assert (quantized.quants != exact.quants).mean() < 0.01
    np.testing.assert_allclose(quantized.scales, exact.scales, rtol=3e-7)
    totals = quantized.quants.reshape(*quantized.scales.shape, 32).sum(axis=-1)
    np.testing.assert_allclose(quantized.sums, quantized.scales * totals, rtol=1e-6, atol=1e-6)
    return error(values, wanted)


def width_of(quant_type: QuantType, blocks_of_32: int, floats: int) -> int:
    """A width for a type: of float elements, of blocks of 32, or of two blocks of 256."""
    return (
        floats if quant_type in FLOAT_TYPES else 32 * blocks_of_32 if quant_type.block_elements == 32 else 512
    )


def record(table: EmulatedTable, gpu: EmulatedGpu, form: str, found: float, allowed: float) -> None:
    for kernel, _ in gpu.launched:
        table.add(kernel, form, gpu.arch, found)
    assert found <= allowed


@pytest.mark.parametrize("quant_type", PLANES, ids=lambda t: t.name)
def test_split_planes(
    gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, quant_type: QuantType
) -> None:
    blocks = np.ascontiguousarray(random_blocks(rng, quant_type, (3, 3 * quant_type.block_elements), 1.0))
    planes, first_bytes = Guarded(blocks.shape, np.uint8), 4 * quant_type.block_bytes
    for part, start in ((blocks.ravel()[:first_bytes], 0), (blocks.ravel()[first_bytes:], first_bytes)):
        run = BlockRun(quant_type, blocks.nbytes, start, part.nbytes)
        gpu.run(split_planes(run, part.ctypes.data, planes.address))
    np.testing.assert_array_equal(planes.checked(), in_planes(blocks, quant_type))
    record(table, gpu, quant_type.name, 0.0, 0.0)


@pytest.mark.parametrize("quant_type", GPU_TYPES, ids=lambda t: t.name)
def test_embed(
    gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, quant_type: QuantType
) -> None:
    width = width_of(quant_type, 5, 77)
    weights = Weights.random(rng, quant_type, 7, width)
    token_ids, newest = np.array([6, -2, 3], np.int32), np.array([5, 0], np.int32)
    gpu.bucket = 4
    out = native_ops.embed(gpu, weights.planes, quant_type.ggml_id, width, token_ids, 1.25, newest)
    token_ids[1] = newest[1]
    record(
        table, gpu, quant_type.name, error(out, reference_ops.embed(weights.values, token_ids, 1.25)), FLOAT32
    )


@pytest.mark.parametrize(("width", "form"), [(160, "both"), (896, "both"), (77, "values")])
@pytest.mark.parametrize("rows", [None, [2, 0]], ids=["tokens", "outputs"])
def test_rms_norm(
    gpu: EmulatedGpu,
    table: EmulatedTable,
    rng: np.random.Generator,
    width: int,
    form: str,
    rows: list[int] | None,
) -> None:
    x = rng.standard_normal((3, width), np.float32)
    x[1] *= 1e-4
    weight = rng.standard_normal(width, np.float32)
    chosen = None if rows is None else np.array(rows, np.int32)
    gpu.bucket = 4
    out = native_ops.rms_norm(gpu, x, weight, 1e-5, chosen, form)
    wanted = reference_ops.rms_norm(x if rows is None else x[rows], weight, 1e-5)
    found = quantization_error(out, wanted) if form == "both" else error(out.float_rows(), wanted)
    record(table, gpu, "F32", found, FLOAT32)


def test_rms_norm_quantizes_what_is_not_finite(gpu: EmulatedGpu, rng: np.random.Generator) -> None:
    x = np.zeros((3, 64), np.float32)
    x[1] = rng.standard_normal(64)
    x[2, 40] = np.inf
    weight = np.ones(64, np.float32)
    weight[3] = np.nan
    quantized = native_ops.rms_norm(gpu, x, weight, 1e-5).quantized_rows()
    assert np.isnan(quantized.scales[:, 0]).all()
    assert np.isnan(quantized.sums[:, 0]).all()
    assert (quantized.quants[:, :32] == 0).all()
    assert quantized.scales[0, 1] == quantized.sums[0, 1] == 0
    assert quantized.scales[1, 1] > 0
    assert np.isnan(quantized.scales[2, 1])


ROPE_CASES = {
    "64": (64, 64, 64, False, False),
    "64-neox-norm": (64, 64, 64, True, True),
    "80-partial-neox": (80, 80, 32, True, False),
    "128-neox": (128, 64, 128, True, False),
    "128-norm": (128, 128, 96, False, True),
}


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_store(gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, case: str) -> None:
    head_dim, value_dim, n_rot, neox, normed = ROPE_CASES[case]
    n, n_heads, n_kv_heads, block_size = 3, 3, 2, 4
    q = rng.standard_normal((n, n_heads, head_dim), np.float32)
    k = rng.standard_normal((n, n_kv_heads, head_dim), np.float32)
    v = rng.standard_normal((n, n_kv_heads, value_dim), np.float32)
    angles = rng.uniform(0, 6, (9, n_rot // 2))
    rotary = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    positions, slots = np.array([8, 0, 5], np.int32), np.array([11, 2, 17], np.int32)
    q_norm, k_norm = (rng.standard_normal(head_dim, np.float32) if normed else None for _ in range(2))
    turned, keys = Guarded.holding(q), Guarded((5, n_kv_heads, block_size, head_dim), np.float16)
    values = Guarded((5, n_kv_heads, block_size, value_dim), np.float16)
    gpu.bucket = 4
    native_ops.rope_store(
        gpu, turned, k, v, keys, values, positions=positions, slots=slots, rotary=rotary, neox=neox,
        q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip

    def rotated(heads: np.ndarray, norm: np.ndarray | None) -> np.ndarray:
        heads = heads if norm is None else reference_ops.rms_norm(heads, norm, 1e-6)
        return reference_ops.rotate(heads, rotary[positions], neox)

    found_keys = keys.checked()[slots // block_size, :, slots % block_size].astype(np.float64)
    found_values = values.checked()[slots // block_size, :, slots % block_size]
    assert error(found_keys, rotated(k, k_norm)) < FLOAT16
    np.testing.assert_array_equal(found_values, v.astype(np.float16))
    for cache in (keys.array, values.array):
        written = np.zeros((5, block_size), bool)
        written[slots // block_size, slots % block_size] = True
        assert (cache.swapaxes(1, 2)[~written].view(np.uint16) == 0xFFFF).all()
    record(table, gpu, "F32", error(turned.checked(), rotated(q, q_norm)), FLOAT32)


#: Rows of a launch, and rows of the step in it: every vector kernel, and every tile kernel.
BUCKETS = {1: 1, 2: 2, 4: 3, 8: 7, 16: 12, 32: 21, 64: 50, 70: 67}
assert set(VECTOR_ROWS) <= set(BUCKETS)


def rounding(quant_type: QuantType, bucket: int) -> float:
    """Quantized weights meet 8-bit activations exactly, tiles of floats as float16."""
    return FLOAT16 if quant_type in FLOAT_TYPES and bucket not in VECTOR_ROWS else FLOAT32


#: Columns, at least, so that every wave of these tiles stages several times.
MANY_COLUMNS = {16: 1100, 32: 600}


def matmul_width(quant_type: QuantType, bucket: int) -> int:
    if bucket in MANY_COLUMNS and quant_type not in FLOAT_TYPES:
        return -(-MANY_COLUMNS[bucket] // quant_type.block_elements) * quant_type.block_elements
    return width_of(quant_type, 28 if bucket in (1, 4) else 5, 173 if bucket in (1, 4) else 40)


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("quant_type", GPU_TYPES, ids=lambda t: t.name)
def test_matmul(
    gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, quant_type: QuantType, bucket: int
) -> None:
    n, width = BUCKETS[bucket], matmul_width(quant_type, bucket)
    tiled, accumulate = bucket not in VECTOR_ROWS, bucket % 4 == 0
    x = Rows.random(rng, n, bucket, width)
    weights = [Weights.random(rng, quant_type, rows, width) for rows in ((70, 3) if tiled else (9, 2, 5))]
    biases = [
        rng.standard_normal(len(w.values), np.float32) if m % 2 == 0 else None for m, w in enumerate(weights)
    ]
    before = [rng.standard_normal((bucket, len(w.values)), np.float32) for w in weights]
    outputs = [Guarded.holding(b) if accumulate else Guarded(b.shape) for b in before]
    step = Step(n_tokens=n, n_sequences=1, n_outputs=n, reserved=0)
    arguments = MatmulArguments(ctypes.addressof(step), x.argument())
    for m, (w, bias, output) in enumerate(zip(weights, biases, outputs, strict=True)):
        arguments.w[m], arguments.y[m] = w.argument(bias), output.address
    arguments.n_matrices, arguments.width, arguments.accumulate = len(weights), width, accumulate
    arguments.over_outputs = bucket == 2
    gpu.bucket = bucket
    gpu.launch("matmul", bytes(arguments))
    errors = []
    for w, bias, output, old in zip(weights, biases, outputs, before, strict=True):
        wanted = reference_ops.matmul(x.seen_by(quant_type), w.values, bias) + (old[:n] if accumulate else 0)
        errors.append(error(output.checked()[:n], wanted))
        spare = output.array[n:]
        assert (spare == old[n:]).all() if accumulate else (spare.view(np.uint8) == 0xFF).all()
    record(table, gpu, quant_type.name, float(np.max(errors)), rounding(quant_type, bucket))


@pytest.mark.parametrize("quant_type", [QuantType.BF16, QuantType.Q8_0], ids=lambda t: t.name)
def test_tiles_of_rows_of_any_magnitude(
    gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, quant_type: QuantType
) -> None:
    magnitudes = np.array([1e5, 1e-6, 1.0, 0.0, 1e30, 1e-25])
    n, width, bucket = len(magnitudes), 160, 32
    x = Rows.random(rng, n, bucket, width, magnitudes)
    weights, output = Weights.random(rng, quant_type, 60, width), Guarded((bucket, 60))
    step = Step(n_tokens=n, n_sequences=1, n_outputs=0, reserved=0)
    arguments = MatmulArguments(ctypes.addressof(step), x.argument())
    arguments.w[0], arguments.y[0] = weights.argument(None), output.address
    arguments.n_matrices, arguments.width = 1, width
    gpu.bucket = bucket
    gpu.launch("matmul", bytes(arguments))
    wanted = reference_ops.matmul(x.seen_by(quant_type), weights.values)
    errors = [error(*rows) for rows in zip(output.checked()[:n], wanted, strict=True)]
    record(table, gpu, quant_type.name, max(errors), rounding(quant_type, bucket))


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("quant_type", GPU_TYPES, ids=lambda t: t.name)
def test_swiglu(
    gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, quant_type: QuantType, bucket: int
) -> None:
    n, width, n_hidden = BUCKETS[bucket], matmul_width(quant_type, bucket), 96
    biased = bucket % 4 == 0
    x = Rows.random(rng, n, bucket, width)
    gate, up = (Weights.random(rng, quant_type, n_hidden, width) for _ in range(2))
    gate_bias, up_bias = (rng.standard_normal(n_hidden, np.float32) if biased else None for _ in range(2))
    out = Output.make(n, n_hidden, spare_rows=bucket - n + 1)
    step = Step(n_tokens=n, n_sequences=1, n_outputs=0, reserved=0)
    arguments = SwigluArguments(
        ctypes.addressof(step),
        x.argument(),
        gate.argument(gate_bias),
        up.argument(up_bias),
        out.argument(),
        width,
    )
    gpu.bucket = bucket
    gpu.launch("swiglu", bytes(arguments))
    wanted = reference_ops.swiglu(x.seen_by(quant_type), gate.values, up.values, gate_bias, up_bias)
    record(table, gpu, quant_type.name, quantization_error(out, wanted), 2 * rounding(quant_type, bucket))


#: head_dim, value_dim, query heads a cache head, cache heads, positions of each sequence, block size.
ATTENTION_CASES = {
    "one-query": (64, 64, 1, 2, [range(0, 1), range(300, 301)], 16),
    "group-3": (80, 80, 3, 2, [range(20, 21)], 32),
    "group-8": (128, 128, 8, 1, [range(17, 18), range(255, 256)], 16),
    "group-12": (64, 64, 12, 1, [range(40, 41)], 16),
    "long-context": (64, 64, 2, 1, [range(1100, 1101)], 16),
    "values-narrower": (128, 64, 2, 2, [range(33, 34), range(9)], 16),
    "many-queries": (64, 64, 2, 1, [range(70)], 16),
    "mixed": (80, 80, 4, 1, [range(5), range(130, 131), range(37, 56), range(0, 1), range(1, 3)], 7),
    "wide": (128, 128, 1, 1, [range(30, 50)], 64),
    "widest": (256, 256, 1, 1, [range(3), range(18, 19)], 16),
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, case: str) -> None:
    head_dim, value_dim, group, n_kv_heads, sequences, block_size = ATTENTION_CASES[case]
    contexts = [positions[-1] + 1 for positions in sequences]
    cache = random_cache(rng, contexts, n_kv_heads, head_dim, value_dim, block_size)
    n_tokens, n_heads = sum(map(len, sequences)), n_kv_heads * group
    q = rng.standard_normal((n_tokens, n_heads, head_dim), np.float32)
    scratch = attention_scratch_bytes(n_tokens, len(sequences), n_heads, value_dim, sum(contexts))
    gpu.bucket = n_tokens + 1
    out = native_ops.attention(gpu, q, cache, sequences, head_dim**-0.5, scratch_bytes=scratch)
    tiled = any(len(positions) > 1 for positions in sequences)
    wanted = expected(q, cache, sequences, head_dim**-0.5)
    record(
        table,
        gpu,
        f"{head_dim}/{value_dim}",
        quantization_error(out, wanted),
        FLOAT16 if tiled else 4 * FLOAT32,
    )


def test_set_tables(gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator) -> None:
    tables = rng.integers(0, 1 << 20, 3000).astype(np.int32)
    changes = np.stack([rng.permutation(3000)[:2000], rng.integers(0, 1 << 20, 2000)], axis=1).astype(
        np.int32
    )
    out = native_ops.set_tables(gpu, tables, changes, 1500)
    tables[changes[:1500, 0]] = changes[:1500, 1]
    record(table, gpu, "", float((out != tables).any()), 0.0)


SAMPLE_CASES = {
    "greedy": [Sampling(), Sampling(temperature=0.0, top_k=3)],
    "temperature": [Sampling(seed, 1, temperature=t) for seed, t in ((1, 0.75), (2, 4.0), (3, 1e-30))],
    "top-k": [Sampling(seed, 2, temperature=1.0, top_k=k) for seed, k in ((1, 7), (2, 1), (3, 10**9))],
    "top-p": [Sampling(seed, 3, temperature=1.0, top_p=p) for seed, p in ((1, 0.75), (2, 0.0), (3, 0.999))],
    "min-p": [Sampling(seed, 4, temperature=1.5, min_p=p) for seed, p in ((1, 0.125), (2, 1.0))],
    "all": [
        Sampling(
            2**63 + 5, 2**30, temperature=0.75, top_k=40, top_p=0.9375, min_p=0.015625, repeat_penalty=1.25,
            presence_penalty=0.5, frequency_penalty=0.25,
            adjustments=[(5, 1, 2, 0.5), (-1, 1, 1, 100.0), (600, 1, 1, 100.0), (7, 3, 0, 1.0), (9, 0, 0,
            4.0)],
        ),
        Sampling(7, 1, temperature=0.75, frequency_penalty=0.5, adjustments=[(5, 1, 2, 0.5)], newest=5),
        Sampling(8, 1, repeat_penalty=1.5, adjustments=[(5, 1, 2, 0.5)], newest=8),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE_CASES)
@pytest.mark.parametrize(("n_vocab", "spread"), [(300, 3.0), (5001, 0.5)])
def test_sample(
    gpu: EmulatedGpu, table: EmulatedTable, rng: np.random.Generator, case: str, n_vocab: int, spread: float
) -> None:
    rows = SAMPLE_CASES[case]
    logits = (rng.standard_normal((len(rows), n_vocab)) * spread).astype(np.float32)
    logits[0, [4, 11, 17]] = np.nan, -np.inf, -0.0
    out = native_ops.sample(gpu, logits, rows, n_top=4)
    expected_logprobs = np.array([reference_ops.logprobs(row) for row in logits])
    errors = []
    for i, (row, token) in enumerate(zip(rows, out.tokens, strict=True)):
        assert_drawn(int(token), logits[i], row)
        best = np.argsort(-expected_logprobs[i], kind="stable")[:4]
        np.testing.assert_array_equal(out.top_tokens[i], best)
        found = np.append(out.top_logprobs[i], out.logprobs[i])
        wanted = expected_logprobs[i, [*best, token]]
        errors.append(np.abs(found - wanted) / (1 + np.abs(wanted)))
    record(table, gpu, "F32", float(np.max(errors)), LOG_PROBABILITY)


def assert_drawn(token: int, logits: np.ndarray, row: Sampling) -> None:
    """The token is the reference's, but where the random number is within rounding of a boundary."""
    row = replace(row, adjustments=[entry for entry in row.adjustments if 0 <= entry[0] < len(logits)])
    if token == reference_ops.sample(logits, row):
        return
    probabilities = reference_ops.distribution(reference_ops.adjust(logits, row), row)
    cumulated, random = np.cumsum(probabilities), reference_ops.uniform(row.seed, row.draw)
    assert probabilities[token] > 0
    assert cumulated[token] - probabilities[token] - 1e-5 <= random <= cumulated[token] + 1e-5


def test_sample_ties_and_what_is_not_finite(gpu: EmulatedGpu) -> None:
    logits = np.zeros((5, 70), np.float32)
    logits[0, [33, 69]] = 5
    logits[1] = -np.inf
    logits[2] = np.nan
    logits[3, 40] = np.inf
    logits[4, 3:] = np.nan
    greedy, ties = Sampling(), Sampling(seed=9, temperature=1.0, top_k=3)
    out = native_ops.sample(gpu, logits, [greedy, greedy, ties, ties, ties], n_top=5)
    np.testing.assert_array_equal(out.tokens[:4], [33, -1, -1, -1])
    np.testing.assert_array_equal(np.isnan(out.logprobs), [False, True, True, True, False])
    np.testing.assert_array_equal(out.top_tokens[0], [33, 69, 0, 1, 2])
    np.testing.assert_array_equal(out.top_tokens[1], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(out.top_tokens[2], [-1] * 5)
    np.testing.assert_array_equal(out.top_tokens[3], [40, 0, 1, 2, 3])
    np.testing.assert_array_equal(out.top_tokens[4], [0, 1, 2, -1, -1])
    assert out.tokens[4] == reference_ops.sample(logits[4], ties)
    np.testing.assert_allclose(out.logprobs[4], -np.log(3), rtol=1e-6)


def test_every_kernel_has_run(module_gpu: EmulatedGpu, table: EmulatedTable) -> None:
    """The last test of the module: those before have run all of KERNELS.md, in every weight format."""
    ran = {key for key, by_arch in table.errors.items() if module_gpu.arch in by_arch}
    listed, weight_formats = listed_kernels(KERNELS.read_text()), {t.name for t in GPU_TYPES}
    assert {kernel for kernel, _ in ran} == {kernel for kernel, _ in listed}
    assert {key for key in listed if key[1] in weight_formats} <= ran
