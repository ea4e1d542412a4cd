"""One request's tokens, and what the scheduler must know to go on with them."""

from __future__ import annotations

import numpy as np

from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.worker.model.step_batch import ADJUSTMENT_DTYPE, SAMPLING_ROW_DTYPE


class Sequence:
    """Prompt and output tokens of one request, and how far its steps have come.

    Attributes:
        tokens: prompt, then output.
        n_dispatched: how many leading tokens were given to steps; the cache holds them once those are done.
        max_length: number of tokens at which the sequence ends.
        stop_tokens: tokens that end it.
        wants_logits: give every position's logits and generate nothing.
        blocks: cache blocks owned; block i holds positions i * block_size and on.
        slot: row of the scheduler's tables while running, else -1.
        epoch: goes up whenever the cache is given up, so that results of older steps are known as such.
        last_step: the latest step with tokens of this sequence; -1 before the first.
        n_deaths: times that workers died over this sequence's steps since it got as far as `n_survived`.
        n_survived: the most leading tokens whose steps are done.
    """

    __slots__ = (
        "adjustments",
        "blocks",
        "epoch",
        "last_step",
        "max_length",
        "n_deaths",
        "n_dispatched",
        "n_prompt",
        "n_survived",
        "params",
        "request_id",
        "row",
        "slot",
        "stop_tokens",
        "tokens",
        "wants_logits",
    )

    def __init__(
        self,
        request_id: str,
        tokens: list[int],
        params: SamplingParams,
        *,
        max_length: int,
        seed: int,
        stop_tokens: frozenset[int],
        wants_logits: bool = False,
    ) -> None:
        self.request_id = request_id
        self.tokens = list(tokens)
        self.n_prompt = len(tokens)
        self.params = params
        self.max_length = max_length
        self.stop_tokens = stop_tokens
        self.wants_logits = wants_logits
        self.row = _sampling_row(params, seed)
        self.adjustments = Adjustments(params, tokens)
        self.blocks: list[int] = []
        self.slot = -1
        self.n_dispatched = 0
        self.epoch = 0
        self.last_step = -1
        self.n_deaths = 0
        self.n_survived = 0

    @property
    def n_pending(self) -> int:
        """Known tokens that no step was given yet: 0 while the next token is awaited."""
        return len(self.tokens) - self.n_dispatched

    @property
    def n_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.n_prompt

    def survive(self, n_tokens: int) -> None:
        """Note that the steps of that many leading tokens are done; deaths count anew once it is a record."""
        if n_tokens > self.n_survived:
            self.n_survived = n_tokens
            self.n_deaths = 0

    def append(self, token: int) -> str | None:
        """Accept a generated token; the reason when it is the last one: "stop" or "length"."""
        self.tokens.append(token)
        if self.params.penalizes:
            self.adjustments.count(token, generated=True)
        if token in self.stop_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None


class Adjustments:
    """Bias and counts of the tokens whose logits a sequence changes, kept up to date token by token."""

    def __init__(self, params: SamplingParams, prompt: list[int]) -> None:
        self._index: dict[int, int] = {}
        self._entries = np.zeros(8, ADJUSTMENT_DTYPE)
        for token, bias in params.logit_bias.items():
            self._entries["bias"][self._row(token)] = bias
        if params.penalizes:
            for token in prompt:
                self.count(token, generated=False)

    def __len__(self) -> int:
        return len(self._index)

    def count(self, token: int, *, generated: bool) -> None:
        """Note one more appearance of `token`."""
        row = self._row(token)
        self._entries["seen"][row] += 1
        if generated:
            self._entries["generated"][row] += 1

    def entries(self) -> np.ndarray:
        """ADJUSTMENT_DTYPE (n,), a view that is valid until the next `count`."""
        return self._entries[: len(self._index)]

    def _row(self, token: int) -> int:
        row = self._index.get(token)
        if row is None:
            row = self._index[token] = len(self._index)
            if row == len(self._entries):
                self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
            self._entries["token"][row] = token
        return row


_SAMPLING_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _sampling_row(params: SamplingParams, seed: int) -> np.ndarray:
    row = np.zeros((), SAMPLING_ROW_DTYPE)
    row["seed"] = seed
    for name in _SAMPLING_FIELDS:
        row[name] = getattr(params, name)
    return row
