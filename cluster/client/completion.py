"""What generation gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redshard.cluster.engine.requests import Increment, Request, TokenLogprob


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


def completion(prompt: list[int], increment: Increment, wants_logprobs: bool) -> Completion:
    """The answer that one increment holds."""
    return Completion(
        text=increment.text,
        token_ids=increment.token_ids,
        finish_reason=increment.ending or "stop",
        prompt_token_ids=prompt,
        usage=Usage(
            len(prompt), len(increment.token_ids), increment.first_token_s or 0.0, increment.total_s or 0.0
        ),
        logprobs=increment.logprobs if wants_logprobs else None,
    )


class ChunkStream:
    """Turns the increments of some requests into chunks of their answers."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._index = {request.request_id: i for i, request in enumerate(requests)}
        self._generated = [0] * len(requests)
        self._first_token_s = [0.0] * len(requests)

    def chunk(self, increment: Increment) -> CompletionChunk:
        """The next chunk of the answer that the increment belongs to."""
        index = self._index[increment.request_id]
        self._generated[index] += len(increment.token_ids)
        if increment.first_token_s is not None:
            self._first_token_s[index] = increment.first_token_s
        return CompletionChunk(
            index=index,
            text=increment.text,
            token_ids=increment.token_ids,
            finish_reason=increment.ending,
            logprobs=increment.logprobs or None,
            usage=self._usage(index, increment) if increment.is_last else None,
        )

    def _usage(self, index: int, increment: Increment) -> Usage:
        return Usage(
            prompt_tokens=len(self._requests[index].tokens),
            completion_tokens=self._generated[index],
            first_token_s=self._first_token_s[index],
            total_s=increment.total_s or 0.0,
        )
