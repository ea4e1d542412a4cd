"""`attention` against numpy, and that a row's result depends on nothing but the row."""

from __future__ import annotations

import numpy as np
import pytest
from support import native_ops, reference_ops
from support.attention_cases import expected, random_cache
from support.native_ops import Cache

import redshard._cpu as _cpu

PARTITION = 128  # positions; contexts around its multiples are the interesting ones


def check(
    runtime: _cpu.Runtime,
    rng: np.random.Generator,
    sequences: list[range],
    *,
    group: int = 1,
    n_kv_heads: int = 2,
    head_dim: int = 64,
    value_dim: int | None = None,
    block_size: int = 16,
    form: str = "values",
) -> None:
    value_dim = value_dim or head_dim
    contexts = [positions[-1] + 1 for positions in sequences]
    cache = random_cache(rng, contexts, n_kv_heads, head_dim, value_dim, block_size)
    n_tokens = sum(len(positions) for positions in sequences)
    q = rng.standard_normal((n_tokens, n_kv_heads * group, head_dim), np.float32)
    scale = head_dim**-0.5
    out = native_ops.attention(runtime, q, cache, sequences, scale, form=form)
    reference = expected(q, cache, sequences, scale)
    if form != "quants":
        np.testing.assert_allclose(out.float_rows(), reference, rtol=2e-5, atol=4e-6)
    if form != "values":
        quantized = out.quantized_rows()
        step = np.repeat(quantized.scales, 32, axis=1)
        assert (np.abs(quantized.values() - reference) <= 0.51 * step + 1e-5).all()
    if form == "both":
        exact = reference_ops.quantize(out.float_rows())
        np.testing.assert_array_equal(quantized.quants, exact.quants)
        np.testing.assert_array_equal(quantized.scales, exact.scales)
        np.testing.assert_array_equal(quantized.sums, exact.sums)


@pytest.mark.parametrize("context", [1, 2, 15, 16, 17, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize("group", [1, 7])
def test_decode_at_any_context(
    runtime: _cpu.Runtime, rng: np.random.Generator, context: int, group: int
) -> None:
    check(runtime, rng, [range(context - 1, context)], group=group)


@pytest.mark.parametrize("group", range(1, 9))
def test_every_number_of_query_heads_for_a_cache_head(
    runtime: _cpu.Runtime, rng: np.random.Generator, group: int
) -> None:
    check(runtime, rng, [range(33), range(200, 201)], group=group)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (5, 3), (24, 40), (256, 256)],
)
@pytest.mark.parametrize("positions", [range(1), range(33), range(140, 150)], ids=["one", "prefill", "chunk"])
def test_head_sizes(
    runtime: _cpu.Runtime, rng: np.random.Generator, head_dim: int, value_dim: int, positions: range
) -> None:
    check(runtime, rng, [positions], group=2, head_dim=head_dim, value_dim=value_dim)


@pytest.mark.parametrize("block_size", [1, 7, 16, 64, 256])
def test_block_sizes(runtime: _cpu.Runtime, rng: np.random.Generator, block_size: int) -> None:
    check(runtime, rng, [range(260, 300), range(5)], block_size=block_size)


@pytest.mark.parametrize("form", ["both", "values", "quants"])
@pytest.mark.parametrize("head_dim", [64, 80])  # a block of 32 may lie across two heads
def test_forms_of_the_output(
    runtime: _cpu.Runtime, rng: np.random.Generator, form: str, head_dim: int
) -> None:
    check(runtime, rng, [range(3), range(150, 152)], head_dim=head_dim, group=3, form=form)


def test_mixed_step(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    sequences = [range(400, 401), range(70), range(0, 1), range(100, 180), range(127, 129), range(513, 514)]
    check(runtime, rng, sequences, group=4, n_kv_heads=2, head_dim=96)


def test_large_scores_do_not_overflow(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    cache = random_cache(rng, [300], 1, 64, 64, 16)
    q = rng.standard_normal((1, 1, 64), np.float32) * 1e4
    out = native_ops.attention(runtime, q, cache, [range(299, 300)], 1.0, form="values").float_rows()
    np.testing.assert_allclose(out, expected(q, cache, [range(299, 300)], 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("head_dim", "group"), [(64, 7), (80, 1)])
def test_a_row_is_the_same_to_the_bit_in_any_step(
    every_runtime: list[_cpu.Runtime], rng: np.random.Generator, head_dim: int, group: int
) -> None:
    context, scale = 400, head_dim**-0.5
    cache = random_cache(rng, [context, 290], 2, head_dim, head_dim, 16)
    q = rng.standard_normal((context, 2 * group, head_dim), np.float32)
    by_isa: dict[str, np.ndarray] = {}
    for runtime in every_runtime:

        def rows(
            q: np.ndarray,
            cache: Cache,
            sequences: list[range],
            scratch: int | None = None,
            runtime: _cpu.Runtime = runtime,
        ) -> np.ndarray:
            out = native_ops.attention(
                runtime, q, cache, sequences, scale, form="values", scratch_bytes=scratch
            )
            return out.float_rows()

        whole = rows(q, cache, [range(context)])
        only_first = Cache(cache.keys, cache.values, cache.block_tables[:1].copy())
        for position in (0, 1, 127, 128, 255, 256, 399):
            one = q[position : position + 1].copy()
            alone = rows(one, only_first, [range(position, position + 1)])
            np.testing.assert_array_equal(alone[0], whole[position])
            unsplit = rows(one, only_first, [range(position, position + 1)], scratch=0)
            np.testing.assert_array_equal(unsplit[0], whole[position])
        chunks, start = [], 0
        for n in (1, 130, 37, 200, 32):
            chunks.append(rows(q[start : start + n].copy(), only_first, [range(start, start + n)]))
            start += n
        np.testing.assert_array_equal(np.concatenate(chunks), whole)
        other = rng.standard_normal((290, 2 * group, head_dim), np.float32)
        batched = rows(np.concatenate([q[390:391], other]), cache, [range(390, 391), range(290)])
        np.testing.assert_array_equal(batched[0], whole[390])
        by_isa.setdefault(runtime.isa, whole)
        np.testing.assert_array_equal(whole, by_isa[runtime.isa])
    vector_results = [rows for isa, rows in by_isa.items() if isa != "portable"]
    for other in vector_results[1:]:
        np.testing.assert_array_equal(other, vector_results[0])


def test_rows_beyond_the_step_are_left_alone(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    cache = random_cache(rng, [10], 1, 64, 64, 16)
    q = np.empty((0, 2, 64), np.float32)
    native_ops.attention(runtime, q, cache, [range(0)], 1.0).float_rows()
