"""What generation gives back."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.requests import Increment, TokenLogprob


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request, and seconds from its arrival to its first and to its last token."""

    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one prompt.

    Attributes:
        text: without special tokens, and cut before a stop string.
        token_ids: everything generated, with the token that ended it.
        finish_reason: "stop" (the model ended it, or a stop string or token was met) or "length" (max_tokens
            or the end of the context was reached).
        prompt_token_ids: the prompt as the model saw it.
        usage: counts and times.
        logprobs: one for each token, if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_token_ids: list[int]
    usage: Usage
    logprobs: list[TokenLogprob] | None = None


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """The next piece of an answer.

    Attributes:
        index: of the prompt it belongs to.
        text: continues that of the chunk before; whole characters.
        token_ids: generated since the chunk before.
        finish_reason: on the last chunk, as for `Completion`; else None.
        logprobs: one for each token, if asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None


def completion(prompt: list[int], increment: Increment, wants_logprobs: bool) -> Completion:
    """The answer that one increment holds."""
    return Completion(
        text=increment.text,
        token_ids=increment.token_ids,
        finish_reason=increment.finish_reason or "stop",
        prompt_token_ids=prompt,
        usage=Usage(
            len(prompt), len(increment.token_ids), increment.first_token_s or 0.0, increment.total_s or 0.0
        ),
        logprobs=increment.logprobs if wants_logprobs else None,
    )
