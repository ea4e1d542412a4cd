"""One request that runs, and what it is given: tokens become text and wait until they are due."""

from __future__ import annotations

import time

from redshard.cluster.completion import TokenLogprob
from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.engine.scheduler import LogitsOutput, TokenOutput
from redshard.cluster.engine.sequence import Sequence
from redshard.cluster.engine.text import TextStream
from redshard.loader.tokenizer.tokenizer import Tokenizer


class Answer:
    """A request, its sequence, and what was not delivered yet.

    Args:
        request: any; what is wrong with it is raised here.
        tokenizer: the model's.

    Attributes:
        request: whose answer it is.
        sequence: for the scheduler.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request = request
        self.sequence = Sequence(
            request.request_id,
            request.tokens,
            params,
            max_length=len(request.tokens) + params.max_tokens,
            seed=request.seed,
            stop_tokens=params.stop_token_ids | (frozenset() if params.ignore_eos else tokenizer.eog_ids),
            wants_logits=request.wants_logits,
        )
        self._text = TextStream(tokenizer, params.stop)
        self._arrived = time.monotonic()
        self._has_token = False
        self._pending = Increment(request.request_id)

    def add(self, output: TokenOutput | LogitsOutput) -> None:
        """Take what a step gave."""
        pending = self._pending
        if isinstance(output, LogitsOutput):
            pending.logits, pending.logits_start = output.logits, output.start
            pending.finish_reason = "stop" if output.finished else None
        elif output.token < 0:
            pending.error = (
                "the logits are not finite: the model's weights are broken, or overflow on this prompt"
            )
        else:
            self._add_token(output)

    def take(self) -> Increment | None:
        """What is due: every step's output of a stream or of logits, otherwise the whole at the end."""
        pending = self._pending
        if pending.is_last:
            pending.total_s = time.monotonic() - self._arrived
        elif pending.logits is None and not (self.request.stream and pending.token_ids):
            return None
        self._pending = Increment(pending.request_id)
        return pending

    def fail(self, error: str) -> Increment:
        """End with an error: the last increment."""
        self._pending.error = error
        return self._pending

    def _add_token(self, output: TokenOutput) -> None:
        pending = self._pending
        if not self._has_token:
            self._has_token = True
            pending.first_token_s = time.monotonic() - self._arrived
        pending.token_ids.append(output.token)
        if self.request.params.logprobs is not None:
            pending.logprobs.append(TokenLogprob(output.token, output.logprob, tuple(output.top)))
        if output.finish_reason != "stop":  # a token that ends the completion is not part of its text
            pending.text += self._text.push(output.token)
        if self._text.stopped:
            pending.finish_reason = "stop"
        elif output.finish_reason is not None:
            pending.text += self._text.flush()
            pending.finish_reason = "stop" if self._text.stopped else output.finish_reason
