"""Renders chat templates in a process of its own, where what a stranger's template can spend is bounded.

Jinja's immutable sandbox keeps a template from reaching anything but what it is given. It does not keep it
from asking for more memory or time than there is, at compile time too, so the operating system does: memory
by RLIMIT_AS, time by whoever waits for the answer, and by a timer here should nobody wait any more.

A request is a pickled `RenderRequest`. An answer is a sign and then "=" the prompt's length in characters, a
mark for each of them (`marked_text`) and its text, or "!" why there is none. Text is UTF-8. Both are preceded
by their length.
"""

from __future__ import annotations

import json
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import IO, Any

from redshard.loader.tokenizer.marked_text import MarkedText, joined, marks_of, written

MAX_MEMORY_BYTES = 1 << 30

_KNOWN_ROLES = frozenset(
    ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "observation")
)

LENGTH = struct.Struct("=q")
PROMPT, PROBLEM = b"=", b"!"


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
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, should nobody wait any more
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    templates = _Templates()
    while (message := read(sys.stdin.buffer)) is not None:
        request: RenderRequest = pickle.loads(message)
        signal.setitimer(signal.ITIMER_REAL, 2 * request.max_seconds)
        answer = templates.answer(request)
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


class _Problem(Exception):
    """Why there is no prompt."""


class _Templates:
    """Compiled templates by their text."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}

    def answer(self, request: RenderRequest) -> bytes:
        """What goes back; never raises."""
        try:
            return _encoded(self._prompt(request))
        except _Problem as problem:
            return PROBLEM + str(problem).encode(errors="replace")
        except MemoryError:
            limit = MAX_MEMORY_BYTES >> 20
            return PROBLEM + f"the chat template makes values larger than the {limit} MiB it has".encode()

    def _prompt(self, request: RenderRequest) -> str:
        try:
            template = self._template(request)
        except Exception as error:
            raise _Problem(f"the chat template is not valid: {_named(error)}") from error
        try:
            return _joined(template.generate(_readable(request.values)), request.max_characters)
        except (_Problem, MemoryError):
            raise
        except Exception as error:
            raise _Problem(f"the chat template failed on these messages: {_named(error)}") from error

    def _template(self, request: RenderRequest) -> Any:
        key = request.source, tuple(sorted(request.special_tokens.items()))
        if key not in self._compiled:
            self._compiled[key] = _environment(request.special_tokens).from_string(request.source)
        return self._compiled[key]


def _named(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:1000]


def _encoded(prompt: str) -> bytes:
    return PROMPT + LENGTH.pack(len(prompt)) + marks_of(prompt) + prompt.encode(errors="surrogatepass")


def _readable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the well-known roles as the template's own words: '<|' + message.role + '|>'."""
    messages = [
        {**message, "role": written(message["role"])} if message["role"] in _KNOWN_ROLES else message
        for message in values["messages"]
    ]
    return {**values, "messages": messages}


def _joined(chunks: Iterable[str], max_characters: int) -> MarkedText:
    parts: list[str] = []
    length = 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length > max_characters:
            raise _Problem(f"the chat template wrote more than {max_characters} characters")
    return joined(parts)


def _raise(message: object) -> None:
    raise _Problem(f"the chat template refuses these messages: {message!s:.1000}")


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


def _join(join: Callable[..., str]) -> Callable[..., str]:
    """Jinja's filter, which joins as its separator does, with one that keeps marks."""

    @wraps(join)
    def marked(context: Any, values: Any, d: Any = "", attribute: Any = None) -> str:
        return join(context, values, joined((str(d),)), attribute)

    return marked


def _environment(special_tokens: Mapping[str, str]) -> Any:
    """What templates find here is what they find in Hugging Face `transformers`.

    Source: https://huggingface.co/docs/transformers/chat_templating_writing.
    """
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it is no more than its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    texts: list[MarkedText] = []

    class MarkingCode(CodeGenerator):
        """Compiles so that the template's own texts are marked, and stay so when they are joined."""

        def _text(self, text: str) -> str:
            texts.append(written(text))
            return f"environment.texts[{len(texts) - 1}]"

        def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
            if isinstance(node.value, str):
                self.write(self._text(node.value))
            else:
                super().visit_Const(node, frame)

        def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
            self.write(self._text(node.data))

        def _output_const_repr(self, group: Iterable[Any]) -> str:
            return self._text("".join(group))

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            self.write("environment.concat(map(str, (")
            for operand in node.nodes:
                self.visit(operand, frame)
                self.write(", ")
            self.write(")))")

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = MarkingCode
        concat = staticmethod(joined)

    environment: Any = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, Generation],
        optimized=False,  # which would compute lists and mappings of texts ahead, without their marks
    )
    environment.filters["tojson"] = _to_json
    environment.filters["join"] = _join(environment.filters["join"])
    environment.filters["safe"] = str  # a prompt is no HTML: text marked as safe would escape what it meets
    environment.globals.update(raise_exception=_raise, strftime_now=_now)
    environment.globals.update({name: written(text) for name, text in special_tokens.items()})
    environment.texts = texts
    return environment
