"""One allocation that holds everything that lives no longer than a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redshard.worker.memory.packing import align_up

_ALIGNMENT = 256


class Arena:
    """Hands out ranges of one allocation. Ranges taken within a phase are reused by the next phase.

    With base 0 it measures: `nbytes` is what the allocation must have.
    """

    def __init__(self, base: int = 0) -> None:
        self.nbytes = 0
        self._base = base
        self._top = 0

    def take(self, nbytes: int) -> int:
        """Address of `nbytes` bytes, aligned to 256."""
        address = self._base + self._top
        self._top += align_up(nbytes, _ALIGNMENT)
        self.nbytes = max(self.nbytes, self._top)
        return address

    @contextmanager
    def phase(self) -> Iterator[None]:
        """What is taken within is free again afterwards."""
        mark = self._top
        yield
        self._top = mark
