"""From what people pass as prompts to token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ParameterError, PromptError
from redshard.loader.tokenizer.chat_template import ChatTemplate, ChatTemplateError
from redshard.loader.tokenizer.marked_text import unmarked
from redshard.loader.tokenizer.tokenizer import Tokenizer

#: Text, token ids, or chat messages (mappings with "role" and "content").
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class PromptEncoder:
    """Turns prompts into token ids, and refuses those that the model cannot take.

    Args:
        tokenizer: the model's.
        chat: its chat template, or why it has none.
        max_length: tokens of the longest sequence, prompt and answer together.
        parse_special: control tokens spelled in chat messages count as such, not only the template's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatTemplate | ChatTemplateError,
        max_length: int,
        parse_special: bool = False,
    ) -> None:
        self._tokenizer, self._chat, self._max_length = tokenizer, chat, max_length
        self._parse_special = parse_special

    def encode(self, prompt: Prompt | np.ndarray, *, n_answer: int = 1) -> list[int]:
        """Token ids of one prompt, which leaves room for at least `n_answer` tokens.

        Raises:
            PromptError: it is empty, too long, of another kind, or names tokens that do not exist.
        """
        tokens = self._tokens(prompt)
        if not tokens:
            raise PromptError("a prompt must have at least one token; this one is empty")
        if len(tokens) + n_answer > self._max_length:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens, but the context has room for "
                f"{self._max_length - n_answer}{' and an answer' if n_answer else ''}; shorten it or load "
                "the model with a larger max_context"
            )
        return tokens

    def encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt; errors as for `encode`, with the number of the prompt."""
        encoded = []
        for number, prompt in enumerate(prompts, 1):
            try:
                encoded.append(self.encode(prompt))
            except PromptError as error:
                if len(prompts) == 1:
                    raise
                raise PromptError(f"prompt {number} of {len(prompts)}: {error}") from error
        return encoded

    def _tokens(self, prompt: Prompt | np.ndarray) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and prompt and all(isinstance(item, Mapping) for item in prompt):
            return self._chat_tokens(prompt)
        try:
            if isinstance(prompt, (bytes, bytearray)):
                raise TypeError
            tokens = [operator.index(token) for token in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise PromptError(f"a prompt is text, token ids or chat messages, not {prompt!r:.80}") from None
        for token in tokens:
            if not 0 <= token < self._tokenizer.n_vocab:
                raise PromptError(
                    f"token {token} is not in the vocabulary of {self._tokenizer.n_vocab} tokens"
                )
        return tokens

    def _chat_tokens(self, messages: Sequence[Any]) -> list[int]:
        if isinstance(self._chat, ChatTemplateError):
            raise PromptError(str(self._chat))
        try:
            text = self._chat.render(messages)
        except ChatTemplateError as error:
            raise PromptError(str(error)) from error
        return self._tokenizer.encode(unmarked(text) if self._parse_special else text, parse_special=True)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, (str, bytes)):
        return [prompts]
    try:
        items: list[Any] = list(prompts)
    except TypeError:
        raise PromptError(f"prompts are text, token ids or chat messages, not {prompts!r:.80}") from None
    if items and all(isinstance(item, (Integral, Mapping)) for item in items):
        return [items]
    return items


def params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, n: int) -> list[SamplingParams]:
    """Sampling parameters for each of `n` prompts.

    Raises:
        ParameterError: there are neither one nor `n` of them.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    each = list(params) if isinstance(params, Sequence) else []
    if len(each) != n or not all(isinstance(item, SamplingParams) for item in each):
        raise ParameterError(f"give one SamplingParams for all, or one for each of the {n} prompts")
    return each


def check_token_ids(params: SamplingParams, n_vocab: int) -> None:
    """Raise ParameterError for parameters that name tokens outside a vocabulary of `n_vocab`."""
    for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if tokens and max(tokens) >= n_vocab:
            raise ParameterError(
                f"sampling parameter {name} names token {max(tokens)}, but the vocabulary has the tokens "
                f"0 to {n_vocab - 1}"
            )
