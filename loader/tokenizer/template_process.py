"""Renders chat templates in a process of its own, where what a stranger's template can spend is bounded.

Jinja's immutable sandbox keeps a template from reaching anything but what it is given. It does not keep it
from asking for more memory or time than there is, at compile time too, so the operating system does: memory
by RLIMIT_AS, time by whoever waits for the answer, and by a timer here should nobody wait any more.

A request is a pickled `RenderRequest`; an answer is UTF-8, one letter and the text: "=" the prompt, "!" why
there is none. Both are preceded by their length.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

MAX_MEMORY_BYTES = 1 << 30

LENGTH = struct.Struct("=q")
PROMPT, PROBLEM = "=", "!"


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """A template, the special tokens' names that it may write, and what it reads."""

    source: str
    special_tokens: Mapping[str, str]
    values: Mapping[str, Any]
    max_characters: int
    max_seconds: float


def serve() -> None:
    """Answer requests from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever waits
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, should nobody wait any more
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    templates = _Templates()
    while (message := read(sys.stdin.buffer)) is not None:
        request: RenderRequest = pickle.loads(message)
        signal.setitimer(signal.ITIMER_REAL, 2 * request.max_seconds)
        answer = templates.answer(request).encode(errors="surrogatepass")
        signal.setitimer(signal.ITIMER_REAL, 0)
        write(sys.stdout.buffer, answer)


def read(stream: IO[bytes]) -> bytes | None:
    """The next message; None at the end."""
    header = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(header)[0]) if len(header) == LENGTH.size else None


def write(stream: IO[bytes], message: bytes) -> None:
    """Send a message."""
    stream.write(LENGTH.pack(len(message)) + message)
    stream.flush()


class _TooLong(Exception):
    """A template writes more than a prompt may have."""


class _Templates:
    """Compiled templates by their text."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}

    def answer(self, request: RenderRequest) -> str:
        """What goes back; never raises."""
        try:
            template = self._template(request)
        except (Exception, RecursionError, MemoryError) as error:
            return f"{PROBLEM}the chat template is not valid: {_named(error)}"
        try:
            return PROMPT + _joined(template.generate(dict(request.values)), request.max_characters)
        except _Refusal as error:
            return f"{PROBLEM}the chat template refuses these messages: {error}"
        except _TooLong:
            return f"{PROBLEM}the chat template wrote more than {request.max_characters} characters"
        except MemoryError:
            return (
                f"{PROBLEM}the chat template makes values larger than the {MAX_MEMORY_BYTES >> 20} MiB it has"
            )
        except Exception as error:
            return f"{PROBLEM}the chat template failed on these messages: {_named(error)}"

    def _template(self, request: RenderRequest) -> Any:
        key = request.source, tuple(sorted(request.special_tokens.items()))
        if key not in self._compiled:
            self._compiled[key] = _environment(request.special_tokens).from_string(request.source)
        return self._compiled[key]


def _named(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:1000]


def _joined(chunks: Iterable[str], max_characters: int) -> str:
    parts: list[str] = []
    length = 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length > max_characters:
            raise _TooLong
    return "".join(parts)


class _Refusal(Exception):
    """The template says that it does not take the messages."""


def _raise(message: str) -> None:
    raise _Refusal(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment(special_tokens: Mapping[str, str]) -> Any:
    """What templates find here is what they find in Hugging Face `transformers`.

    Source: https://huggingface.co/docs/transformers/chat_templating_writing.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it is no more than its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(special_tokens, raise_exception=_raise, strftime_now=_now)
    return environment
