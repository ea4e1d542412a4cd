"""Operations on GPUs against numpy, but for matrix products: ``kernels/hip`` through the kernel set.

On stand-in AMD GPUs the same sources run on the host, a fiber a lane; where there is an NVIDIA GPU, on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import reference_ops
from support.comparisons import (
    GPU_TYPES,
    assert_close,
    assert_quantized,
    dequantized,
)
from support.gguf_models import random_blocks
from support.gpu_memory import GpuMemory
from support.native_ops import first_partitions, newest_tokens, slot_of
from support.reference_ops import Sampling

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import (
    Adjustment,
    AttentionArguments,
    EmbedArguments,
    RmsNormArguments,
    RopeStoreArguments,
    SampleArguments,
    SamplingRow,
    SetTablesArguments,
)

every_type = pytest.mark.parametrize("quant_type", GPU_TYPES, ids=lambda t: t.name)


@every_type
def test_embed(memory: GpuMemory, rng: np.random.Generator, quant_type: QuantType) -> None:
    width, ids = 512, rng.integers(0, 70, 5).astype(np.int32)
    newest = rng.integers(0, 70, 4).astype(np.int32)
    ids[0] = -1 - 2  # what was sampled last in slot 2
    blocks = random_blocks(rng, quant_type, (70, width), 0.5)
    out = memory.room((9, width))
    arguments = EmbedArguments(
        memory.put_step(5),
        memory.put(ids),
        memory.put(newest),
        memory.put_matrix(blocks, quant_type),
        out.address,
        width,
        1.5,
    )
    memory.device.launch("embed", arguments, 8)
    looked_up = [newest[2], *ids[1:]]
    expected = reference_ops.embed(dequantized(blocks, quant_type), np.array(looked_up), 1.5)
    np.testing.assert_allclose(memory.read_rows(out, 5), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_changes", [0, 1, 5000])
def test_set_tables(memory: GpuMemory, rng: np.random.Generator, n_changes: int) -> None:
    tables = rng.integers(0, 1 << 20, 9000).astype(np.int32)
    changes = np.empty((6000, 2), np.int32)
    changes[:, 0], changes[:, 1] = rng.permutation(len(tables))[:6000], rng.integers(0, 1 << 20, 6000)
    room = memory.room_holding(tables)
    arguments = SetTablesArguments(memory.put_step(1, n_changes=n_changes), memory.put(changes), room.address)
    memory.device.launch("set_tables", arguments, 1)
    tables[changes[:n_changes, 0]] = changes[:n_changes, 1]
    np.testing.assert_array_equal(memory.read(room), tables)


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
    table_rows = rng.permutation(len(sequences)).astype(np.int32)
    q = rng.standard_normal((n, n_heads, head_dim), np.float32)
    bound = next(rows for rows in memory.device.row_buckets(128) if rows >= n)
    context = table_width * block_size
    total = sum(sequence.stop for sequence in sequences)
    scratch = memory.room(
        (memory.device.scratch_bytes(bound, len(sequences), n_heads, value_dim, context, total) // 4,)
    )
    width = n_heads * value_dim
    out = memory.room_for_activation(bound, width, "both" if width % 32 == 0 else "values")
    arguments = AttentionArguments(
        memory.put_step(n, len(sequences)),
        memory.put(positions),
        memory.put(rows),
        memory.put(starts),
        memory.put(table_rows),
        memory.put(first_partitions(sequences)),
        memory.put(tables[np.argsort(table_rows)]),
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
    for index, (entry, row) in enumerate(zip(packed, rows, strict=True)):
        for name, _ in SamplingRow._fields_[:-4]:
            setattr(entry, name, getattr(row, name))
        entry.first_adjustment = len(adjustments)
        adjustments += [Adjustment(*each) for each in row.adjustments]
        entry.end_adjustment = len(adjustments)
        entry.slot, entry.count_newest = slot_of(index), row.newest is not None
    listed = bytes((Adjustment * len(adjustments))(*adjustments))
    newest = memory.room_holding(newest_tokens(rows))
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
        newest.address,
        *(output.address for output in outputs),
        n_vocab,
        n_top,
    )
    memory.device.launch("sample", arguments, n)
    tokens, logprobs, top_tokens, top_logprobs = (memory.read(output) for output in outputs)
    np.testing.assert_array_equal(memory.read(newest)[[slot_of(i) for i in range(n)]], tokens)
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
        Sampling(
            seed=int(rng.integers(1 << 63)),
            draw=i,
            adjustments=adjustments,
            newest=[None, adjustments[3][0], int(rng.integers(n_vocab))][i % 3],
            **settings,
        )
        for i in range(n)
    ]
    tokens = sampled(memory, logits, rows)[0]
    for token, row, own in zip(tokens, rows, logits, strict=True):
        if token == reference_ops.sample(own, row):
            continue
        probabilities = reference_ops.distribution(reference_ops.adjust(own, row), row)
        end, random = np.cumsum(probabilities)[token], reference_ops.uniform(row.seed, row.draw)
        assert end - probabilities[token] - 1e-4 <= random <= end + 1e-4, "not even by rounding"
