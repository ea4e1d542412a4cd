"""Text files named on the command line, where ``-`` is standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their line ends.

    Raises:
        ValueError: the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    try:
        if str(path) == "-":
            yield from (line.rstrip("\n") for line in sys.stdin)
        else:
            with path.open(encoding="utf-8") as file:
                yield from (line.rstrip("\n") for line in file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
