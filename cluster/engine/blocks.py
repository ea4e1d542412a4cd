"""Who owns which block of the paged key/value cache."""

from __future__ import annotations


class BlockManager:
    """Hands out cache blocks 0 .. n_blocks - 1, each to one owner at a time.

    Blocks given back last are handed out first: they are the likeliest to be in a cache.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._free = list(range(n_blocks - 1, -1, -1))

    @property
    def n_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """`n` blocks; the caller has checked `n_free`."""
        if n > len(self._free):
            raise ValueError(f"{n} cache blocks wanted, {len(self._free)} free")
        if n == 0:
            return []
        taken = self._free[-n:][::-1]
        del self._free[-n:]
        return taken

    def release(self, blocks: list[int]) -> None:
        """Take blocks back."""
        self._free.extend(reversed(blocks))
