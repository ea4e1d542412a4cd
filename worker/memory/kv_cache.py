"""Paged key/value storage for a group of a stage's layers, in one allocation.

Each layer has two arrays as in ``kernels/common/arguments.h``: keys [n_blocks, n_kv_heads, block_size,
head_dim] and values [n_blocks, n_kv_heads, block_size, value_dim], float16. Which sequence owns which block
is the scheduler's business; block numbers are the same in every layer and every stage.
"""

from __future__ import annotations

from redshard.loader.model.cache_groups import CacheGroup
from redshard.worker.memory.pool import MemoryPool, View

DEFAULT_BLOCK_SIZE = 32

#: Kernels number slots with int32.
_MAX_SLOTS = (1 << 31) - 1


class KVCache:
    """The cache of one group of layers.

    Attributes:
        group: its layers.
        n_blocks: blocks numbered 0 to n_blocks - 1; block_size: tokens of each.
        keys: by the layers' numbers in the model, float16 [n_blocks, n_kv_heads, block_size, head_dim].
        values: by the layers' numbers in the model, float16 [n_blocks, n_kv_heads, block_size, value_dim].
    """

    def __init__(
        self, pool: MemoryPool, group: CacheGroup, n_blocks: int, block_size: int = DEFAULT_BLOCK_SIZE
    ) -> None:
        """Allocate `n_blocks` blocks.

        Raises:
            ValueError: no blocks, or more slots than int32 can number.
            PoolError: the device has no room.
        """
        n_slots = n_blocks * block_size
        if not 1 <= n_slots <= _MAX_SLOTS:
            raise ValueError(
                f"{n_blocks} blocks of {block_size} tokens are not between 1 and 2**31 - 1 tokens"
            )
        self.group = group
        self.n_blocks, self.block_size = n_blocks, block_size
        sizes: dict[str, int] = {}
        for layer, attention in group.layers:
            sizes[f"layer {layer} keys"] = n_slots * attention.key_bytes
            sizes[f"layer {layer} values"] = n_slots * attention.value_bytes
        views = pool.allocate_group("kv cache", sizes)
        self.keys: dict[int, View] = {layer: views[f"layer {layer} keys"] for layer, _ in group.layers}
        self.values: dict[int, View] = {layer: views[f"layer {layer} values"] for layer, _ in group.layers}

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks in all layers."""
        return self.n_blocks * self.block_size * self.group.bytes_per_token
