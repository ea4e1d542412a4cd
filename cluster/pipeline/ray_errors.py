"""What an error that Ray hands on says in one line."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """The reason alone, of an error from an actor or of an actor's death.

    What an actor raised says it itself. An actor that dies in its constructor, or whose class cannot be
    imported, leaves a traceback, whose last line names the error; other deaths are told in Ray's first line.
    """
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return type(cause).__name__
    is_traceback = getattr(error, "actor_init_failed", False) or "Traceback (most recent" in str(cause)
    return lines[-1 if is_traceback else 0].rstrip(".")
