"""Every pre-tokenizer takes time in proportion to the text, whatever the text repeats."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from tokenizers import Regex, pre_tokenizers

from redshard.loader.tokenizer.pre_tokenizers import PRE_TOKENIZERS

KINDS = [
    " ", "\t", "\n", "\r\n", "\u00a0", "a", "A", "aA", "a ", "1", "\u0661", "!", " !", "'", "/", "\u0301",
    "\u6f22", "\u304b", "\ud55c", "\u20ac", "\U0001f600",
]  # fmt: skip
NAMES = {pre_tokenizer.patterns: name for name, pre_tokenizer in PRE_TOKENIZERS.items()}
#: Four times the run takes four times as long; sixteen times, if each character looks at all others.
SHORT, LONG, MOST = 1000, 4000, 9


def timed(patterns: tuple[str, ...]) -> Callable[[str], float]:
    """Tells how long a text takes, in seconds of this process."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(one), "isolated") for one in patterns])

    def seconds(text: str) -> float:
        began = time.process_time()
        split.pre_tokenize_str(text)
        return time.process_time() - began

    return seconds


@pytest.mark.parametrize("patterns", NAMES, ids=NAMES.values())
def test_runs_take_linear_time(patterns: tuple[str, ...]) -> None:
    seconds = timed(patterns)
    for kind in KINDS:
        for end in ("", *KINDS):
            if seconds(kind * LONG + end) < 0.01:
                continue  # too short a time for a quadratic pattern
            ratios = [seconds(kind * LONG + end) / seconds(kind * SHORT + end) for _ in range(5)]
            assert min(ratios) < MOST, (kind, end)


@pytest.mark.parametrize("patterns", NAMES, ids=NAMES.values())
def test_long_runs_of_white_space_take_linear_time(patterns: tuple[str, ...]) -> None:
    """A pattern that cuts a run into pieces of hundreds looks at all that follows only so often."""
    seconds = timed(patterns)
    for kind in (" ", "\t", "\n", "\u00a0", " \n"):
        short, long = (kind * (n // len(kind)) + "x" for n in (50_000, 200_000))
        if seconds(long) > 0.1:
            assert min(seconds(long) / seconds(short) for _ in range(5)) < MOST, kind
