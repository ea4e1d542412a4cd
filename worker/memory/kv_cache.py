"""Paged key/value storage for the layers of a stage, in one allocation.

Each layer has two arrays as in ``kernels/common/arguments.h``: keys [n_blocks, n_kv_heads, block_size,
head_dim] and values [n_blocks, n_kv_heads, block_size, value_dim], float16. Which sequence owns which block
is the scheduler's business; block numbers are the same in every layer and every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redshard.worker.memory.pool import MemoryPool, View

DEFAULT_BLOCK_SIZE = 32

_ELEMENT_BYTES = 2
#: Kernels number slots with int32.
_MAX_SLOTS = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: for each head, head_dim elements of key and value_dim of value."""

    n_kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """Sizes of a cache, before there is one.

    Attributes:
        layers: of the stage, in order.
        block_size: tokens of a block.
    """

    layers: tuple[LayerShape, ...]
    block_size: int = DEFAULT_BLOCK_SIZE

    def __post_init__(self) -> None:
        dimensions = [n for shape in self.layers for n in (shape.n_kv_heads, shape.head_dim, shape.value_dim)]
        if not dimensions or min(dimensions) < 1 or self.block_size < 1:
            raise ValueError(f"a KV cache needs layers, heads and a block size above zero, not {self}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        elements = sum(shape.n_kv_heads * (shape.head_dim + shape.value_dim) for shape in self.layers)
        return elements * _ELEMENT_BYTES

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block in all layers."""
        return self.bytes_per_token * self.block_size

    def nbytes(self, n_blocks: int) -> int:
        """Bytes of a cache of `n_blocks`."""
        return n_blocks * self.bytes_per_block


class KVCache:
    """The cache of one stage.

    Attributes:
        layout: its layers and block size.
        n_blocks: blocks numbered 0 to n_blocks - 1.
    """

    def __init__(self, pool: MemoryPool, layout: KVCacheLayout, n_blocks: int) -> None:
        """Allocate `n_blocks` blocks.

        Raises:
            ValueError: no blocks, or more slots than int32 can number.
            PoolError: the device has no room.
        """
        if not 1 <= n_blocks * layout.block_size <= _MAX_SLOTS:
            raise ValueError(
                f"{n_blocks} blocks of {layout.block_size} tokens are not between 1 and 2**31 - 1 tokens"
            )
        self.layout = layout
        self.n_blocks = n_blocks
        sizes: dict[str, int] = {}
        for layer, shape in enumerate(layout.layers):
            heads = n_blocks * shape.n_kv_heads * layout.block_size * _ELEMENT_BYTES
            sizes[f"layer {layer} keys"] = heads * shape.head_dim
            sizes[f"layer {layer} values"] = heads * shape.value_dim
        views = list(pool.allocate_group("kv cache", sizes).values())
        self._keys: Sequence[View] = views[0::2]
        self._values: Sequence[View] = views[1::2]

    def keys(self, layer: int) -> View:
        """Keys of the stage's layer `layer`: float16 [n_blocks, n_kv_heads, block_size, head_dim]."""
        return self._keys[layer]

    def values(self, layer: int) -> View:
        """Values of the stage's layer `layer`: float16 [n_blocks, n_kv_heads, block_size, value_dim]."""
        return self._values[layer]
