"""Paged caches of random keys and values, and what attention over them gives."""

from __future__ import annotations

import numpy as np
from support import reference_ops
from support.native_ops import Cache


def random_cache(
    rng: np.random.Generator,
    contexts: list[int],
    n_kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_size: int,
) -> Cache:
    """Sequences of these lengths in scattered blocks; all that no sequence has written is NaN."""
    needed = [-(-context // block_size) for context in contexts]
    blocks = rng.permutation(sum(needed) + 5)
    tables = np.full((len(contexts), max(needed) + 2), -1, np.int32)
    keys = np.full((len(blocks), n_kv_heads, block_size, head_dim), np.nan, np.float16)
    values = np.full((len(blocks), n_kv_heads, block_size, value_dim), np.nan, np.float16)
    used = 0
    for table, n_blocks, context in zip(tables, needed, contexts, strict=True):
        table[:n_blocks] = blocks[used : used + n_blocks]
        used += n_blocks
        for i, block in enumerate(table[:n_blocks]):
            n = min(block_size, context - i * block_size)
            keys[block, :, :n] = rng.standard_normal((n_kv_heads, n, head_dim))
            values[block, :, :n] = rng.standard_normal((n_kv_heads, n, value_dim))
    return Cache(keys, values, tables)


def expected(q: np.ndarray, cache: Cache, sequences: list[range], scale: float) -> np.ndarray:
    """Rows of `q` (n_tokens, n_heads, head_dim), at the positions of the sequences in order."""
    places = [(s, position) for s, positions in enumerate(sequences) for position in positions]
    rows = [
        reference_ops.attention(
            row,
            cache.rows(cache.keys, s, position + 1),
            cache.rows(cache.values, s, position + 1),
            position,
            scale,
        ).ravel()
        for row, (s, position) in zip(q, places, strict=True)
    ]
    return np.array(rows)
