"""Chat messages to prompt text, by the Jinja template that a GGUF file carries.

Templates are written for Hugging Face `transformers`, so they find here what they find there
(https://huggingface.co/docs/transformers/chat_templating_writing). But a template comes in a stranger's file:
it runs in Jinja's immutable sandbox, and what it can spend is bounded. `range` by the sandbox, the prompt by
`MAX_PROMPT_CHARACTERS`, the time by `MAX_RENDER_SECONDS`, and the result of any one operation that can be
much larger than its operands by `MAX_VALUE_SIZE`.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_PROMPT_CHARACTERS = 1 << 24
MAX_VALUE_SIZE = 1 << 24
"""Characters of a string, entries of a list, or bits of a number."""
MAX_RENDER_SECONDS = 10.0

_GROWING_METHODS = frozenset(
    ("center", "expandtabs", "format", "format_map", "join", "ljust", "replace", "rjust", "zfill")
)
_GROWING_FILTERS = ("batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap")
_NUMBER = re.compile(r"[0-9]{1,4000}")
_WIDTH_ARGUMENT = re.compile(r"%[^A-Za-z%]*\*|\{[^{}]*:[^{}]*\{")


class ChatTemplateError(ValueError):
    """The file has no usable chat template, or the messages do not suit it."""


class ChatTemplate:
    """Renders chat messages as the prompt that a model was trained on.

    The prompt spells the model's special tokens, so encode it with `parse_special=True`.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Compile the templates.

        sources: template texts by name; `default`, and `tool_use` where there is one for requests with tools.
        special_tokens: `bos_token` and the like, for the template to write.

        Raises:
            ChatTemplateError: a template is too long or not valid Jinja.
        """
        environment = _Environment(extensions=[loopcontrols, _Generation])
        environment.globals.update(special_tokens, raise_exception=_raise, strftime_now=_now)
        self._templates = {}
        for name, source in sources.items():
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                raise ChatTemplateError(
                    f"chat template {name!r} has {len(source)} characters, over {MAX_TEMPLATE_CHARACTERS}"
                )
            try:
                self._templates[name] = environment.from_string(source)
            except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
                raise ChatTemplateError(f"chat template {name!r} is not valid: {error}") from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The template of a GGUF file.

        Raises:
            ChatTemplateError: the file has none, or a broken one.
        """
        key = "tokenizer.chat_template"
        sources = {"default": metadata.get(key), "tool_use": metadata.get(f"{key}.tool_use")}
        texts = {name: source for name, source in sources.items() if isinstance(source, str) and source}
        if "default" not in texts:
            raise ChatTemplateError(
                f"the file has no chat template ({key}); send a plain prompt, or use a chat model's file"
            )
        return cls(texts, _special_tokens(metadata))

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for a conversation.

        messages: each with `role`, and `content` that is text or a list of text parts; None only beside
            `tool_calls`.
        add_generation_prompt: end where the model's answer begins.
        variables: what else the template may read, such as `tools`.

        Raises:
            ChatTemplateError: the messages are malformed, or the template refuses them, fails or exceeds its
            bounds.
        """
        conversation = _checked(messages)
        name = "tool_use" if variables.get("tools") and "tool_use" in self._templates else "default"
        values = {"tools": None, "documents": None, **variables}
        values.update(messages=conversation, add_generation_prompt=add_generation_prompt)
        return _within_deadline(lambda: _joined(self._templates[name].generate(values)))


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    spelled = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id_ = metadata.get(f"tokenizer.ggml.{key}_token_id")
        spelled[f"{name}_token"] = tokens[id_] if isinstance(id_, int) and 0 <= id_ < len(tokens) else ""
    return spelled


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatTemplateError("chat messages must be a list of at least one message")
    return [_checked_message(number, message) for number, message in enumerate(messages)]


def _checked_message(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"chat message {number} must be a mapping with a text 'role'")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part_text(number, part) for part in content)
    if not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
        raise ChatTemplateError(f"chat message {number} must have a text 'content', or a list of text parts")
    return {**message, "content": content}


def _part_text(number: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ChatTemplateError(f"chat message {number} has a part that is not text; only text can be read")


def _joined(chunks: Iterable[str]) -> str:
    parts: list[str] = []
    length = 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length > MAX_PROMPT_CHARACTERS:
            raise ChatTemplateError(f"the chat template wrote more than {MAX_PROMPT_CHARACTERS} characters")
    return "".join(parts)


class _TimeIsUp(Exception):
    """Raised inside a template that runs too long."""


def _within_deadline(render: Callable[[], str]) -> str:
    """The result of `render`, run in a thread so that it can be broken off between two bytecodes."""
    texts: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            texts.append(render())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    thread.join(MAX_RENDER_SECONDS)
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TimeIsUp))
        raise ChatTemplateError(f"the chat template ran for more than {MAX_RENDER_SECONDS:g} s")
    if errors:
        if isinstance(errors[0], ChatTemplateError):
            raise errors[0]
        reason = str(errors[0]) or type(errors[0]).__name__
        raise ChatTemplateError(f"the chat template failed on these messages: {reason}") from errors[0]
    return texts[0]


def _raise(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses these messages: {message}")


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None:
        _refuse_huge(indent, 1 << 10)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for inference it is no more than its
    body.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _concatenated(strings: Iterable[str]) -> str:
    strings = list(strings)
    _refuse_larger(sum(map(len, strings)))
    return "".join(strings)


class _BoundedCode(CodeGenerator):
    """Compiles `a ~ b` to the environment's own concatenation."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")))")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on what one operation can make."""

    code_generator_class = _BoundedCode
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_concatenated)

    def __init__(self, extensions: Sequence[str | type[Extension]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        for name in _GROWING_FILTERS:
            self.filters[name] = _bounded(self.filters[name])
        self.filters["tojson"] = _to_json

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _refuse_huge(
                abs(left) if isinstance(left, int) else 1, abs(right) if isinstance(right, int) else 1
            )
        elif operator == "+" and isinstance(left, str | Sequence) and isinstance(right, str | Sequence):
            _refuse_larger(len(left) + len(right))
        elif isinstance(left, str | Sequence) or isinstance(right, str | Sequence):
            _refuse_growth("format" if operator == "%" else operator, (left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, callee: Any, *arguments: Any, **keywords: Any) -> Any:
        name = getattr(callee, "__name__", "")
        if name in _GROWING_METHODS:
            arguments = _settled(arguments)
            method = getattr(callee, "__wrapped__", callee)  # the sandbox wraps str.format
            _refuse_growth(name, (getattr(method, "__self__", None), *arguments, *keywords.values()))
        return super().call(context, callee, *arguments, **keywords)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*arguments: Any, **keywords: Any) -> Any:
        arguments = _settled(arguments)
        _refuse_growth(function.__name__, (*arguments, *keywords.values()))
        return function(*arguments, **keywords)

    return bounded


def _settled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists in place of iterators, whose size cannot be told."""
    return tuple(list(argument) if isinstance(argument, Iterator) else argument for argument in arguments)


def _refuse_growth(operation: str, operands: Iterable[Any]) -> None:
    """Refuse what could yield more than the product of its operands' sizes allows."""
    operands = list(operands)
    counts = operation not in ("format", "join", "replace")
    if operation == "format" and isinstance(operands[0], str):
        _refuse_larger(max(map(int, _NUMBER.findall(operands[0])), default=0))
        counts = _WIDTH_ARGUMENT.search(operands[0]) is not None
    _refuse_huge(*(_size(operand, counts) for operand in operands))


def _size(operand: Any, counts: bool) -> int:
    """How much text an operand can add; `counts`: its numbers are widths or repetitions."""
    if isinstance(operand, int):
        return abs(operand) if counts else 1
    if isinstance(operand, list | tuple):
        return sum(_size(entry, counts) for entry in operand)
    return len(operand) if isinstance(operand, str | Mapping) else 1


def _refuse_huge(*factors: int) -> None:
    size = 1
    for factor in factors:
        size *= max(1, factor)
        _refuse_larger(size)


def _refuse_larger(size: int) -> None:
    if size > MAX_VALUE_SIZE:
        raise ChatTemplateError(f"the chat template makes a value larger than {MAX_VALUE_SIZE}")
