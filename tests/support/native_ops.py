"""The operations of `redshard._cpu` on numpy arrays, into poisoned outputs between guard zones."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from support.reference_ops import QUANT_BLOCK, Quantized, Sampling

import redshard._cpu as _cpu
from redshard.worker.device.arguments import (
    PARTITION,
    Activation,
    Adjustment,
    AttentionArguments,
    EmbedArguments,
    Matrix,
    RmsNormArguments,
    RopeStoreArguments,
    SampleArguments,
    SamplingRow,
    SetTablesArguments,
    Step,
)

_GUARD_BYTES = 64


class Guarded:
    """An array of poison (all bits set: NaN, or -1) between two guard zones."""

    def __init__(self, shape: tuple[int, ...], dtype: type = np.float32) -> None:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._memory = np.full(nbytes + 2 * _GUARD_BYTES, 0xFF, np.uint8)
        self.array = self._memory[_GUARD_BYTES : _GUARD_BYTES + nbytes].view(dtype).reshape(shape)

    @classmethod
    def holding(cls, values: np.ndarray) -> Guarded:
        guarded = cls(values.shape, values.dtype.type)
        guarded.array[...] = values
        return guarded

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def checked(self) -> np.ndarray:
        assert (self._memory[:_GUARD_BYTES] == 0xFF).all(), "written before the output"
        assert (self._memory[self._memory.size - _GUARD_BYTES :] == 0xFF).all(), "written behind the output"
        return self.array


@dataclass(frozen=True)
class Output:
    """An activation to be written, in both forms or one, with spare rows that must stay as they are."""

    values: Guarded | None
    quants: Guarded | None
    scales: Guarded | None
    sums: Guarded | None
    rows: int

    @classmethod
    def make(cls, rows: int, width: int, form: str = "both", spare_rows: int = 1) -> Output:
        n = rows + spare_rows
        values = Guarded((n, width)) if form in ("both", "values") else None
        if form == "values":
            return cls(values, None, None, None, rows)
        blocks = (n, width // QUANT_BLOCK)
        return cls(values, Guarded((n, width), np.int8), Guarded(blocks), Guarded(blocks), rows)

    def argument(self) -> Activation:
        parts = (self.values, self.quants, self.scales, self.sums)
        return Activation(*(part.address if part else 0 for part in parts))

    def _part(self, part: Guarded) -> np.ndarray:
        spare = part.checked()[self.rows :]
        assert (np.ascontiguousarray(spare).view(np.uint8) == 0xFF).all(), "written to spare rows"
        return part.array[: self.rows]

    def float_rows(self) -> np.ndarray:
        assert self.values
        return self._part(self.values)

    def quantized_rows(self) -> Quantized:
        assert self.quants
        assert self.scales
        assert self.sums
        return Quantized(self._part(self.quants), self._part(self.scales), self._part(self.sums))


def _address(array: np.ndarray | None) -> int:
    if array is None:
        return 0
    assert array.flags.c_contiguous
    return array.ctypes.data


def set_tables(runtime: _cpu.Runtime, tables: np.ndarray, changes: np.ndarray, n_changes: int) -> np.ndarray:
    """Tables int32 (n,) after the first so many changes int32 (m, 2), of a place and its new block."""
    step, out = Step(1, 1, 0, n_changes), Guarded.holding(tables)
    arguments = SetTablesArguments(ctypes.addressof(step), _address(changes), out.address)
    runtime.launch("set_tables", bytes(arguments))
    return out.checked()


def embed(
    runtime: _cpu.Runtime,
    blocks: np.ndarray,
    ggml_type: int,
    width: int,
    token_ids: np.ndarray,
    scale: float,
    newest: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of a table given as GGUF blocks, uint8 (n_vocab, bytes of a row)."""
    step, out = Step(len(token_ids), 1, 0, 0), Output.make(len(token_ids), width, "values")
    assert out.values
    table = Matrix(_address(blocks), 0, ggml_type, len(blocks))
    arguments = EmbedArguments(
        ctypes.addressof(step),
        _address(token_ids),
        _address(newest),
        table,
        out.values.address,
        width,
        scale,
    )
    runtime.launch("embed", bytes(arguments))
    return out.float_rows()


def rms_norm(
    runtime: _cpu.Runtime,
    x: np.ndarray,
    weight: np.ndarray,
    eps: float,
    rows: np.ndarray | None = None,
    form: str = "both",
) -> Output:
    """Of all rows of x (n_tokens, width), or of `rows` int32 (n_outputs,)."""
    n_outputs = 0 if rows is None else len(rows)
    step = Step(len(x), 1, n_outputs, 0)
    out = Output.make(len(x) if rows is None else n_outputs, x.shape[1], form)
    arguments = RmsNormArguments(
        ctypes.addressof(step), _address(x), _address(rows), _address(weight), out.argument(), x.shape[1], eps
    )
    runtime.launch("rms_norm", bytes(arguments))
    return out


def rope_store(
    runtime: _cpu.Runtime,
    q: Guarded,
    k: np.ndarray,
    v: np.ndarray,
    k_cache: Guarded,
    v_cache: Guarded,
    *,
    positions: np.ndarray,
    slots: np.ndarray,
    rotary: np.ndarray,
    neox: bool,
    eps: float = 1e-6,
    q_norm: np.ndarray | None = None,
    k_norm: np.ndarray | None = None,
) -> None:
    """Turns q in place and stores k and v; rotary is (positions, n_rot / 2, 2)."""
    n_tokens, n_heads, head_dim = q.array.shape
    step = Step(n_tokens, 1, 0, 0)
    arguments = RopeStoreArguments(
        step=ctypes.addressof(step),
        positions=_address(positions),
        slots=_address(slots),
        q=q.address,
        k=_address(k),
        v=_address(v),
        q_norm=_address(q_norm),
        k_norm=_address(k_norm),
        rotary=_address(rotary),
        k_cache=k_cache.address,
        v_cache=v_cache.address,
        n_heads=n_heads,
        n_kv_heads=k.shape[1],
        head_dim=head_dim,
        value_dim=v.shape[2],
        n_rot=2 * rotary.shape[1],
        neox=neox,
        block_size=k_cache.array.shape[2],
        eps=eps,
    )
    runtime.launch("rope_store", bytes(arguments))


@dataclass(frozen=True)
class Cache:
    """A paged cache and the sequences in it: float16 (n_blocks, n_kv_heads, block_size, dim) twice."""

    keys: np.ndarray
    values: np.ndarray
    block_tables: np.ndarray  # int32 (n_sequences, table_width)

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    def rows(self, cache: np.ndarray, sequence: int, n_positions: int) -> np.ndarray:
        """The first positions of a sequence, (n_positions, n_kv_heads, dim)."""
        blocks = self.block_tables[sequence, : -(-n_positions // self.block_size)]
        by_position = cache[blocks].swapaxes(1, 2)
        return by_position.reshape(-1, *by_position.shape[2:])[:n_positions]


def attention(
    runtime: _cpu.Runtime,
    q: np.ndarray,
    cache: Cache,
    sequences: Sequence[Sequence[int]],
    scale: float,
    *,
    form: str = "both",
    scratch_bytes: int | None = None,
) -> Output:
    """Rows q (n_tokens, n_heads, head_dim) at the positions of each of the cache's sequences, in order."""
    n_tokens, n_heads, head_dim = q.shape
    n_kv_heads, value_dim = cache.values.shape[1], cache.values.shape[3]
    positions = np.array([position for positions in sequences for position in positions], np.int32)
    rows = np.repeat(np.arange(len(sequences), dtype=np.int32), [len(positions) for positions in sequences])
    starts = np.cumsum([0, *(len(positions) for positions in sequences)], dtype=np.int32)
    if scratch_bytes is None:
        context = int(positions.max(initial=0)) + 1
        scratch_bytes = _cpu.attention_scratch_bytes(n_tokens, n_heads, value_dim, context)
    scratch = Guarded((scratch_bytes // 4,))
    table_rows = np.arange(len(sequences), dtype=np.int32)[::-1].copy()
    partitions = first_partitions(sequences)
    shuffled = np.full_like(cache.block_tables, -1, shape=(len(sequences) + 1, cache.block_tables.shape[1]))
    shuffled[table_rows] = cache.block_tables[: len(sequences)]
    step = Step(n_tokens, len(sequences), 0, 0)
    out = Output.make(n_tokens, n_heads * value_dim, form)
    arguments = AttentionArguments(
        step=ctypes.addressof(step),
        positions=_address(positions),
        sequences=_address(rows),
        query_starts=_address(starts),
        table_rows=_address(table_rows),
        first_partitions=_address(partitions),
        block_tables=_address(shuffled),
        q=_address(q),
        k_cache=_address(cache.keys),
        v_cache=_address(cache.values),
        out=out.argument(),
        scratch=scratch.address,
        scratch_bytes=scratch_bytes,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        block_size=cache.block_size,
        table_width=cache.block_tables.shape[1],
        scale=scale,
        max_sequences=len(sequences),
    )
    runtime.launch("attention", bytes(arguments))
    scratch.checked()
    return out


def first_partitions(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Where the partial results of each sequence begin, int32: those with one query have some."""
    sizes = [positions[-1] // PARTITION + 1 if len(positions) == 1 else 0 for positions in sequences]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int32)


def slot_of(row: int) -> int:
    """A slot for each row of a test, in another order than the rows."""
    return row ^ 1


def newest_tokens(rows: Sequence[Sampling]) -> np.ndarray:
    """The token sampled last in each slot, int32, where the rows have one."""
    newest = np.full(len(rows) + 1, -7, np.int32)
    for index, row in enumerate(rows):
        if row.newest is not None:
            newest[slot_of(index)] = row.newest
    return newest


@dataclass(frozen=True)
class Sampled:
    """Int32 (n,), float32 (n,), int32 (n, n_top), float32 (n, n_top)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


def sample(runtime: _cpu.Runtime, logits: np.ndarray, rows: Sequence[Sampling], n_top: int = 0) -> Sampled:
    """One token for each row of logits float32 (n, n_vocab), which are left as they are."""
    n, n_vocab = logits.shape
    own_logits = Guarded.holding(logits)
    packed_rows, packed_adjustments = (SamplingRow * n)(), []
    for index, (packed, row) in enumerate(zip(packed_rows, rows, strict=True)):
        for name, _ in SamplingRow._fields_[:-4]:
            setattr(packed, name, getattr(row, name))
        packed.first_adjustment = len(packed_adjustments)
        packed_adjustments += [Adjustment(*entry) for entry in row.adjustments]
        packed.end_adjustment = len(packed_adjustments)
        packed.slot, packed.count_newest = slot_of(index), row.newest is not None
    adjustments = (Adjustment * len(packed_adjustments))(*packed_adjustments)
    newest = newest_tokens(rows)
    tokens, logprobs = Guarded((n,), np.int32), Guarded((n,))
    top_tokens, top_logprobs = Guarded((n, n_top), np.int32), Guarded((n, n_top))
    step = Step(n, n, n, 0)
    arguments = SampleArguments(
        step=ctypes.addressof(step),
        logits=own_logits.address,
        rows=ctypes.addressof(packed_rows),
        adjustments=ctypes.addressof(adjustments),
        newest=_address(newest),
        tokens=tokens.address,
        logprobs=logprobs.address,
        top_tokens=top_tokens.address,
        top_logprobs=top_logprobs.address,
        n_vocab=n_vocab,
        n_top=n_top,
    )
    runtime.launch("sample", bytes(arguments))
    own_logits.checked()
    assert newest[[slot_of(i) for i in range(n)]].tolist() == tokens.array.tolist()
    return Sampled(tokens.checked(), logprobs.checked(), top_tokens.checked(), top_logprobs.checked())
