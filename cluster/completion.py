"""What generation gives back, in plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's log probability by the model, before penalties, temperature and truncation.

    Attributes:
        token_id: the token.
        logprob: natural logarithm.
        top: (token id, logprob) of the most probable tokens, best first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
        finish_reason: "stop" (the model ended it, or a stop string or token was met), "length" (max_tokens or
            the end of the context was reached) or "error".
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
        usage: on the last chunk, of the whole answer.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    usage: Usage | None = None
