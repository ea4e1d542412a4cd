"""From the increments of requests to completions and their chunks."""

from __future__ import annotations

from collections.abc import Sequence

from redshard.cluster.completion import Completion, CompletionChunk, Usage
from redshard.cluster.engine.requests import Increment, Request


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
