"""Chat messages to prompt text, by the Jinja template that a GGUF file carries.

A template comes in a stranger's file, so it runs in a process of its own with bounded memory, time and
output (`template_process`). Templates read a message's content as text or as a list of parts; which of the
two is found out by trying, because the other one vanishes from the prompt without an error.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redshard.loader.tokenizer import template_process
from redshard.loader.tokenizer.template_process import LENGTH, PROMPT, RenderRequest, write

logger = logging.getLogger(__name__)

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_PROMPT_CHARACTERS = 1 << 24
MAX_RENDER_SECONDS = 10.0

#: A text as it is to be read as content: what `Tokenizer.conceal` gives, for instance.
Conceal = Callable[[str], str]


class ChatTemplateError(ValueError):
    """The file has no usable chat template, or the messages do not suit it."""


class ChatTemplate:
    """Renders chat messages as the prompt that a model was trained on. Safe to share between threads.

    The prompt spells the model's special tokens, so encode it with `parse_special=True`.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Take the templates, which are compiled when they are first used.

        sources: template texts by name; `default`, and `tool_use` where there is one for requests with tools.
        special_tokens: `bos_token` and the like, for the template to write.

        Raises:
            ChatTemplateError: a template is too long.
        """
        for name, source in sources.items():
            if len(source) > MAX_TEMPLATE_CHARACTERS:
                raise ChatTemplateError(
                    f"chat template {name!r} has {len(source)} characters, over {MAX_TEMPLATE_CHARACTERS}"
                )
        self._sources, self._special_tokens = dict(sources), dict(special_tokens)
        self._reads_parts: dict[tuple[str, str], bool] = {}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The template of a GGUF file.

        Raises:
            ChatTemplateError: the file has none, or one that is too long.
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
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        conceal: Conceal | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        messages: each with `role`, and `content` that is text or a list of text parts; None only beside
            `tool_calls`.
        add_generation_prompt: end where the model's answer begins.
        conceal: what every text but roles is passed through: see `Tokenizer.conceal`.
        variables: what else the template may read, such as `tools`.

        Raises:
            ChatTemplateError: the messages are malformed, or the template is not valid, refuses them, fails
                or exceeds its bounds.
        """
        name = "tool_use" if variables.get("tools") and "tool_use" in self._sources else "default"
        conversation = [self._readable(name, message) for message in _checked(messages)]
        if conceal is not None:
            conversation = [
                {**_all_concealed(message, conceal), "role": message["role"]} for message in conversation
            ]
            variables = _all_concealed(variables, conceal)
        values = {"tools": None, "documents": None, **variables}
        values.update(messages=conversation, add_generation_prompt=add_generation_prompt)
        return self._rendered(name, values)

    def _rendered(self, name: str, values: Mapping[str, Any]) -> str:
        request = RenderRequest(
            self._sources[name],
            self._special_tokens,
            values,
            MAX_PROMPT_CHARACTERS,
            MAX_RENDER_SECONDS,
        )
        return _sandbox.render(request)

    def _readable(self, name: str, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose content has the form that the template reads."""
        content = message["content"]
        if content is None:
            return message
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if self._takes_parts(name, message["role"]):
            return {**message, "content": parts}
        return {**message, "content": "".join(part["text"] for part in parts)}

    def _takes_parts(self, name: str, role: str) -> bool:
        """Whether the template shows the text of such a message only if it is in a list of parts."""
        if (name, role) not in self._reads_parts:
            self._reads_parts[name, role] = self._probe(name, role)
        return self._reads_parts[name, role]

    def _probe(self, name: str, role: str) -> bool:
        probe = f"probe {secrets.token_hex(8)}"
        shown = {}
        for form, content in (("text", probe), ("parts", [{"type": "text", "text": probe}])):
            values = {
                "messages": _conversation_with({"role": role, "content": content}),
                "add_generation_prompt": True,
                "tools": None,
                "documents": None,
            }
            try:
                shown[form] = probe in self._rendered(name, values)
            except ChatTemplateError as error:
                logger.debug("%s as %s: %s", role, form, error)
        if shown.get("text"):  # a list shown as it is contains the text too
            return False
        if shown.get("parts"):
            return True
        if shown:
            logger.warning(
                "the chat template shows nothing of messages by %r, neither as text nor as parts; the model "
                "may not get to read them",
                role,
            )
        return False


def _conversation_with(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation as templates expect it, with a message of any role in it."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    match message["role"]:
        case "user":
            return [message]
        case "assistant":
            return [question, message, question]
        case "tool":
            return [question, answer, message]
        case _:
            return [message, question]


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
        content = [_checked_part(number, part) for part in content]
    elif not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
        raise ChatTemplateError(f"chat message {number} must have a text 'content', or a list of text parts")
    return {**message, "content": content}


def _checked_part(number: int, part: Any) -> dict[str, Any]:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return dict(part)
    raise ChatTemplateError(f"chat message {number} has a part that is not text; only text can be read")


def _all_concealed(value: Any, conceal: Conceal) -> Any:
    """The same with every text passed through `conceal`, but for the keys of mappings."""
    if isinstance(value, str):
        return conceal(value)
    if isinstance(value, Mapping):
        return {key: _all_concealed(item, conceal) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_all_concealed(item, conceal) for item in value]
    return value


class _Sandbox:
    """The process that renders, started when it is needed and again after it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: RenderRequest) -> str:
        """The prompt. Raises ChatTemplateError with the reason where there is none."""
        try:
            message = pickle.dumps(request)
        except Exception as error:
            raise ChatTemplateError(f"the chat messages hold what cannot be passed on: {error}") from None
        with self._lock:
            answer = self._answer(message, request.max_seconds)
        if not answer.startswith(PROMPT):
            raise ChatTemplateError(answer[1:])
        return answer[1:]

    def _answer(self, message: bytes, max_seconds: float) -> str:
        process = self._started()
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # its end is noticed below
                write(process.stdin, message)
            answer = self._read(process, time.monotonic() + max_seconds)
        except BaseException:  # an interrupt too: what comes next would be the answer to this
            self._end()
            raise
        return answer.decode(errors="surrogatepass")

    def _read(self, process: subprocess.Popen[bytes], ends: float) -> bytes:
        header = self._read_exactly(process, LENGTH.size, ends)
        return self._read_exactly(process, LENGTH.unpack(header)[0], ends)

    def _read_exactly(self, process: subprocess.Popen[bytes], n: int, ends: float) -> bytes:
        assert process.stdout is not None
        data = bytearray()
        while len(data) < n:
            left = ends - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise ChatTemplateError(f"the chat template ran for more than {MAX_RENDER_SECONDS:g} s")
            if not (piece := process.stdout.read1(n - len(data))):  # type: ignore[attr-defined]
                raise ChatTemplateError("the chat template ended the process that renders it")
            data += piece
        return bytes(data)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            path, module = repr(sys.path), template_process.__name__
            code = f"import sys; sys.path[:] = {path}; from {module} import serve; serve()"
            command = [sys.executable, "-c", code]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_sandbox = _Sandbox()
