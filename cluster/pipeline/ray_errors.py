"""What an error that Ray hands on says in one line."""

from __future__ import annotations

import re

#: Where a traceback from another process begins: "ray::Class.method() (pid=...".
_REMOTE = re.compile(r"ray::.*\(pid=")
_MODULES = re.compile(r"^(\w+\.)+(?=\w+(:|$))")


def reason(error: BaseException) -> str:
    """The reason alone, of an error from an actor or of an actor's death.

    What an actor raised says it itself. An actor that dies in its constructor, or whose class cannot be
    imported, leaves a traceback, which names the error below its frames; other deaths are told in Ray's first
    line.
    """
    cause = getattr(error, "cause", None) or error
    lines = str(cause).splitlines()
    if getattr(error, "actor_init_failed", False):
        lines = _after_frames(lines)
    first = next((line.strip() for line in lines if line.strip()), type(cause).__name__)
    return _MODULES.sub("", first).rstrip(".")


def _after_frames(lines: list[str]) -> list[str]:
    """What the last traceback says behind its frames, which are indented."""
    begin = max((number for number, line in enumerate(lines, 1) if _REMOTE.search(line)), default=0)
    for number, line in enumerate(lines[begin:], begin):
        if line and not line[0].isspace():
            return lines[number:]
    return lines
