"""Prompts from files and standard input: UTF-8 whatever the locale, and nothing else is let through."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from redshard.cluster.commands.text_files import read_lines

TEXT = "first\r\n\nзима 雪 \u2028 🙂\nlast".encode()
Source = Callable[[bytes], Path]
LINES = ["first", "", "зима 雪 \u2028 🙂", "last"]


@pytest.fixture(params=["file", "standard input"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Makes bytes readable under a path; standard input as Python opens it in the C locale."""

    def source(content: bytes) -> Path:
        if request.param == "file":
            path = tmp_path / "prompts.txt"
            path.write_bytes(content)
            return path
        stdin = io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", stdin)
        return Path("-")

    return source


def test_lines_are_split_at_line_ends_alone(source: Source) -> None:
    assert list(read_lines(source(TEXT))) == LINES
    assert list(read_lines(source(b"\xef\xbb\xbf" + TEXT))) == LINES
    assert list(read_lines(source(b""))) == []


def test_what_is_not_utf8_is_refused_by_its_line(source: Source) -> None:
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        list(read_lines(source(b"fine\n\xff\xfe\n")))


@pytest.mark.parametrize(("name", "reason"), [("none.txt", "No such file"), (".", "directory")])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(OSError, match=rf"{tmp_path}.* cannot be read: .*{reason}"):
        list(read_lines(tmp_path / name))
