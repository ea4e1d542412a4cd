"""How long a step may take, from how long steps like it have taken."""

from __future__ import annotations

import statistics
from collections import deque

#: A step is late at so many times the median of those like it, but not before `_LEAST_S`.
_TIMES_MEDIAN = 20.0
_LEAST_S = 5.0
#: Steps of a size that are remembered, and that must have been seen before their times count.
_REMEMBERED, _ENOUGH = 64, 8


class StepDeadline:
    """The deadline of each step: learnt from steps of about as many rows, never above a bound.

    Args:
        most_s: the bound, and the deadline as long as too few such steps were seen.
        times: by how much this deadline exceeds that of another who watches the same steps more closely.
    """

    def __init__(self, most_s: float, times: float = 1.0) -> None:
        self._most_s, self._times = most_s, times
        self._seconds: dict[int, deque[float]] = {}

    def of(self, rows: int) -> float:
        """Seconds that a step of so many rows may take."""
        seen = self._seconds.get(rows.bit_length(), ())
        if len(seen) < _ENOUGH:
            return self._most_s
        return min(self._most_s, self._times * max(_LEAST_S, _TIMES_MEDIAN * statistics.median(seen)))

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        self._seconds.setdefault(rows.bit_length(), deque(maxlen=_REMEMBERED)).append(seconds)
