"""One request's tokens, and what the scheduler must know to go on with them."""

from __future__ import annotations

import numpy as np

from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.worker.model.step_batch import (
    ADJUSTMENT_CHANGE_DTYPE,
    ADJUSTMENT_DTYPE,
    SAMPLING_ROW_DTYPE,
)


class Sequence:
    """Prompt and output tokens of one request, and how far its steps have come.

    Attributes:
        tokens: prompt, then output, as far as it is known.
        n_awaited: tokens that follow, which steps under way will give.
        n_dispatched: how many leading tokens were given to steps, awaited ones included; the cache holds them
            once those steps are done.
        max_length: number of tokens at which the sequence ends.
        stop_tokens: tokens that end it.
        wants_logits: give every position's logits and generate nothing.
        blocks: cache blocks owned; block i holds positions i * block_size and on.
        slot: where the stages keep its block table and adjustments while it runs, else -1.
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
        "n_awaited",
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
        self.n_awaited = 0
        self.n_dispatched = 0
        self.epoch = 0
        self.last_step = -1
        self.n_deaths = 0
        self.n_survived = 0

    @property
    def n_pending(self) -> int:
        """Tokens known or awaited that no step was given yet."""
        return len(self.tokens) + self.n_awaited - self.n_dispatched

    @property
    def can_go_on(self) -> bool:
        """Whether there is room for a token behind those known and awaited."""
        return len(self.tokens) + self.n_awaited < self.max_length

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
            self.adjustments.count(token)
        if token in self.stop_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.max_length else None


class Adjustments:
    """Bias and counts of the tokens whose logits a sequence changes, and which the stages do not know."""

    def __init__(self, params: SamplingParams, prompt: list[int]) -> None:
        biased = list(params.logit_bias)
        counted, counts = np.unique(prompt if params.penalizes else [], return_counts=True)
        tokens = np.unique(np.concatenate([np.array(biased, np.int64), counted.astype(np.int64)]))
        self._index = {token: row for row, token in enumerate(tokens.tolist())}
        self._entries = np.zeros(max(8, len(tokens)), ADJUSTMENT_DTYPE)
        self._entries["token"][: len(tokens)] = tokens
        self._entries["bias"][[self._index[token] for token in biased]] = list(params.logit_bias.values())
        self._entries["seen"][np.searchsorted(tokens, counted)] = counts
        self._changed = set(range(len(tokens)))

    def __len__(self) -> int:
        return len(self._index)

    def count(self, token: int) -> None:
        """Note one more appearance of `token`, in the output."""
        row = self._index.setdefault(token, len(self._index))
        if row == len(self._entries):
            self._entries = np.concatenate([self._entries, np.zeros_like(self._entries)])
        entry = self._entries[row]
        entry["token"] = token
        entry["seen"] += 1
        entry["generated"] += 1
        self._changed.add(row)

    def forget_sent(self) -> None:
        """The stages know nothing any more."""
        self._changed = set(range(len(self._index)))

    def take_changes(self, slot: int) -> np.ndarray | None:
        """What changed since the last call, for the sequence in `slot`: ADJUSTMENT_CHANGE_DTYPE (n,)."""
        if not self._changed:
            return None
        rows = sorted(self._changed)
        self._changed.clear()
        changes = np.empty(len(rows), ADJUSTMENT_CHANGE_DTYPE)
        changes["slot"], changes["index"], changes["adjustment"] = slot, rows, self._entries[rows]
        return changes


_SAMPLING_FIELDS = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _sampling_row(params: SamplingParams, seed: int) -> np.ndarray:
    row = np.zeros((), SAMPLING_ROW_DTYPE)
    row["seed"] = seed
    for name in _SAMPLING_FIELDS:
        row[name] = getattr(params, name)
    return row
