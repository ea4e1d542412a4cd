"""Texts and text files named on the command line, where ``-`` is standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

STDIN = "-"


def shown_name(path: Path) -> str:
    """What messages call a file."""
    return "standard input" if str(path) == STDIN else str(path)


def with_stdin_lines(texts: Iterable[str]) -> Iterator[str]:
    """The texts, with what `read_texts` gives of standard input in the place of each ``-``."""
    for text in texts:
        yield from read_texts(Path(STDIN)) if text == STDIN else (text,)


def read_texts(path: Path) -> Iterator[str]:
    """As `read_lines`, without blank lines."""
    return (line for line in read_lines(path) if line.strip())


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their line ends; a byte order mark is no text.

    Raises:
        ValueError: the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    name = shown_name(path)
    with ExitStack() as stack:
        try:
            # As bytes: in the C locale, Python lets through what is not UTF-8 on standard input.
            lines: IO[bytes] = (
                sys.stdin.buffer if str(path) == STDIN else stack.enter_context(path.open("rb"))
            )
            for number, line in enumerate(lines, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}: not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise OSError(f"{name} cannot be read: {error.strerror or error}") from error
