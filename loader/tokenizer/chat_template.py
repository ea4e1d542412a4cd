"""Chat messages to prompt text, by the Jinja template that a GGUF file carries.

A template comes in a stranger's file, so it runs in a process of its own with bounded memory, time and
output (`template_process`). Templates read a message's content as text or as a list of parts; which of the
two is found out by trying, because the other one vanishes from the prompt without an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import islice, product
from typing import Any, Literal, get_args

from redshard.loader.tokenizer import template_process
from redshard.loader.tokenizer.marked_text import MarkedText
from redshard.loader.tokenizer.template_process import LENGTH, PROMPT, RenderRequest, write

logger = logging.getLogger(__name__)

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_PROMPT_CHARACTERS = 1 << 24
MAX_RENDER_SECONDS = 10.0

_MAX_GUESSES = 16
_PROBE = "3141592653589793238462643383279502884197"  # survives changes of case, white space and quoting

#: How a template reads `content`: as text, or as a list of parts with `type` and `text`.
Form = Literal["text", "parts"]


class ChatTemplateError(ValueError):
    """The file has no usable chat template, or the messages do not suit it."""


class ChatTemplate:
    """Renders chat messages as the prompt that a model was trained on. Safe to share between threads."""

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
        self._forms: dict[tuple[str, str], Form] = {}  # by template and role, as far as they are known

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
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> MarkedText:
        """The prompt for a conversation, which knows what of it the template wrote.

        It spells the model's special tokens, so encode it with `parse_special=True`: `Tokenizer.encode` finds
        them in what the template wrote, and takes what the messages say literally.

        messages: each with `role`, and `content` that is text or a list of text parts; None only beside
            `tool_calls`.
        add_generation_prompt: end where the model's answer begins.
        variables: what else the template may read, such as `tools`.

        Raises:
            ChatTemplateError: the messages are malformed, or the template is not valid, refuses them, fails,
                exceeds its bounds, or leaves out what some role says.
        """
        name = "tool_use" if variables.get("tools") and "tool_use" in self._sources else "default"
        values = {
            "tools": None,
            "documents": None,
            **variables,
            "add_generation_prompt": add_generation_prompt,
        }
        return _Rendering(self, name, values).prompt(_checked(messages))


class _Rendering:
    """One conversation on its way to a prompt, in `MAX_RENDER_SECONDS` altogether."""

    def __init__(self, template: ChatTemplate, name: str, values: Mapping[str, Any]) -> None:
        self._template, self._name, self._values = template, name, values
        self._seconds = MAX_RENDER_SECONDS  # that are left

    def prompt(self, conversation: Sequence[Mapping[str, Any]]) -> MarkedText:
        return self._rendered(conversation, self._forms(conversation))

    def _rendered(self, conversation: Sequence[Mapping[str, Any]], forms: Mapping[str, Form]) -> MarkedText:
        request = RenderRequest(
            self._template._sources[self._name],
            self._template._special_tokens,
            {**self._values, "messages": [_in_form(message, forms) for message in conversation]},
            MAX_PROMPT_CHARACTERS,
            MAX_RENDER_SECONDS,
        )
        with _sandbox.lock:  # the time that others take is not this one's
            began = time.monotonic()
            try:
                return _sandbox.render(request, began + self._seconds)
            finally:
                self._seconds -= time.monotonic() - began

    def _forms(self, conversation: Sequence[Mapping[str, Any]]) -> dict[str, Form]:
        """For each role the form in which the template shows what it says.

        A role is probed when it is first met, in the conversation at hand, with other words as its content.
        """
        roles = dict.fromkeys(message["role"] for message in conversation if _must_be_shown(message))
        known = self._template._forms
        forms = {role: known[self._name, role] for role in roles if (self._name, role) in known}
        unknown = [role for role in roles if role not in forms]
        words = {role: f"{number}{_PROBE}{number}" for number, role in enumerate(roles, 10)}
        probe = [
            {**message, "content": words[message["role"]]} if _must_be_shown(message) else message
            for message in conversation
        ]
        never_shown: set[str] | None = None  # as long as the template has rendered nothing
        for guess in islice(product(get_args(Form), repeat=len(unknown)), _MAX_GUESSES):
            guessed = {**forms, **dict(zip(unknown, guess, strict=True))}
            if not unknown:
                return guessed
            try:
                prompt = self._rendered(probe, guessed)
            except ChatTemplateError as error:
                logger.debug("contents as %s: %s", guessed, error)
                continue
            hidden = {role for role in unknown if words[role] not in prompt}
            if not hidden:
                known.update({(self._name, role): guessed[role] for role in unknown})
                return guessed
            never_shown = hidden if never_shown is None else never_shown & hidden
        if never_shown:
            raise ChatTemplateError(
                f"the chat template leaves out what {', '.join(map(repr, sorted(never_shown)))} says in "
                "such a conversation, given as text and as a list of parts"
            )
        return forms


def _must_be_shown(message: Mapping[str, Any]) -> bool:
    """Whether a template has to show the content; what stands beside tool calls is often left out."""
    return bool(message["content"]) and not message.get("tool_calls")


def _in_form(message: Mapping[str, Any], forms: Mapping[str, Form]) -> Mapping[str, Any]:
    content = message["content"]
    if content is None:
        return message
    if forms.get(message["role"]) == "parts":
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return {**message, "content": parts}
    return {**message, "content": content if isinstance(content, str) else _text_of(content)}


def _text_of(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


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


class _Sandbox:
    """The process that renders, started when it is needed and again after it had to be ended.

    lock: to be held while something is rendered.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: RenderRequest, ends: float) -> MarkedText:
        """The prompt, if it is there when `time.monotonic()` is `ends`.

        Raises:
            ChatTemplateError: why there is none.
        """
        try:
            message = pickle.dumps(request)
        except Exception as error:
            raise ChatTemplateError(f"the chat messages hold what cannot be passed on: {error}") from None
        answer = self._answer(message, ends)
        sign, rest = answer[: len(PROMPT)], answer[len(PROMPT) :]
        if sign != PROMPT:
            raise ChatTemplateError(rest.decode(errors="replace"))
        (length,) = LENGTH.unpack_from(rest)
        marks, text = rest[LENGTH.size : LENGTH.size + length], rest[LENGTH.size + length :]
        return MarkedText(text.decode(errors="surrogatepass"), marks)

    def _answer(self, message: bytes, ends: float) -> bytes:
        process = self._started()
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # its end is noticed below
                write(process.stdin, message)
            return self._read(process, ends)
        except BaseException:  # an interrupt too: what comes next would be the answer to this
            self._end()
            raise

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
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for whoever waits
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_sandbox = _Sandbox()
# A forked process has the pipes of its parent: it must not talk into them, and needs a process of its own.
os.register_at_fork(after_in_child=_sandbox.__init__)  # type: ignore[misc]
