"""A toy language model with a paged cache that obeys the worker's contract, for proofs about scheduling.

A token's hidden state is a hash of the hidden states that the cache holds for its sequence, read through the
block table, so a wrong position, a block with two owners or a lost write changes every token that follows.
All values are integers below 2**20 and therefore exact in float32.
"""

from __future__ import annotations

import numpy as np

from redshard.worker.model.step_batch import StepBatch, StepResult

N_VOCAB = 64
_PRIME = 1048573


class FakeStage:
    """One stage of the toy model."""

    def __init__(self, stage: int, n_stages: int, n_blocks: int, block_size: int) -> None:
        self.stage, self.n_stages, self.block_size = stage, n_stages, block_size
        self.cache = np.full(n_blocks * block_size, -1, np.int64)
        self.last_step = -1
        self.tables: dict[int, dict[int, int]] = {}  # by slot and column
        self.adjustments: dict[int, dict[int, np.void]] = {}  # by slot and number
        self.newest: dict[int, int] = {}  # the token sampled last, by slot

    def run(self, batch: StepBatch, hidden: np.ndarray | None) -> np.ndarray | StepResult:
        """Hidden states (n_tokens, 1) float32, or the result on the last stage."""
        check_batch(batch)
        assert batch.step_id > self.last_step, "steps must come in order"
        self.last_step = batch.step_id
        for slot, column, block in batch.table_entries.tolist():
            self.tables.setdefault(slot, {})[column] = block
        for change in batch.adjustment_changes:
            self.adjustments.setdefault(int(change["slot"]), {})[int(change["index"])] = change["adjustment"]
        values = self._looked_up(batch.token_ids) if hidden is None else hidden[:, 0]
        owners: dict[int, int] = {}
        out = np.empty((len(batch.token_ids), 1), np.float32)
        for row, (first, last) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False)):
            n = int(batch.positions[last - 1]) + 1
            places = np.arange(n)
            slot = int(batch.slots[row])
            blocks = np.array([self.tables[slot][column] for column in places // self.block_size])
            for block in set(blocks.tolist()):
                assert owners.setdefault(block, slot) == slot, "a block with two owners"
            slots = blocks * self.block_size + places % self.block_size
            self.cache[slots[batch.positions[first:last]]] = values[first:last]
            out[first:last, 0] = _hidden(self.cache[slots], self.stage)[batch.positions[first:last]]
        if self.stage < self.n_stages - 1:
            return out
        return self._result(batch, out[batch.output_rows, 0].astype(np.int64))

    def _looked_up(self, token_ids: np.ndarray) -> np.ndarray:
        if self.n_stages > 1:
            assert (token_ids >= 0).all(), "only a stage that samples knows its tokens"
        return np.array([self.newest[-1 - id_] if id_ < 0 else id_ for id_ in token_ids.tolist()])

    def _result(self, batch: StepBatch, hidden: np.ndarray) -> StepResult:
        empty = np.empty(0, np.int32)
        if batch.return_logits:
            return StepResult(batch.step_id, empty, empty, empty, empty, logits(hidden))
        tokens = []
        for value, row in zip(hidden, batch.sampling, strict=True):
            slot = int(row["slot"])
            known = [self.adjustments[slot][number] for number in range(row["end_adjustment"])]
            counts = {int(entry["token"]): [int(entry["seen"]), int(entry["generated"])] for entry in known}
            if row["count_newest"]:
                newest = counts.setdefault(self.newest[slot], [0, 0])
                newest[0] += 1
                newest[1] += 1
            adjustment = sum(token * (3 * seen + 5 * made) for token, (seen, made) in counts.items())
            seed, draw = int(row["seed"]), int(row["draw"])
            tokens.append(_token(int(value), seed, draw, float(row["temperature"]), adjustment))
            self.newest[slot] = tokens[-1]
        n = len(tokens)
        top = np.argsort(-logits(hidden), axis=1, kind="stable")[:, : batch.n_top].astype(np.int32)
        return StepResult(
            batch.step_id,
            np.array(tokens, np.int32),
            np.full(n, -1.0, np.float32),
            top,
            -np.arange(top.size, dtype=np.float32).reshape(top.shape),
        )


def check_batch(batch: StepBatch) -> None:
    """What every batch must be like, whatever the scheduler does."""
    n_tokens, n_sequences = len(batch.token_ids), len(batch.query_starts) - 1
    assert batch.query_starts[0] == 0
    assert batch.query_starts[-1] == n_tokens
    assert (np.diff(batch.query_starts) > 0).all()
    assert batch.positions.shape == (n_tokens,)
    assert len(np.unique(batch.slots)) == len(batch.slots) == n_sequences
    for name in ("token_ids", "positions", "query_starts", "slots", "output_rows"):
        assert getattr(batch, name).dtype == np.int32, name
    for first, last in zip(batch.query_starts, batch.query_starts[1:], strict=False):
        assert (np.diff(batch.positions[first:last]) == 1).all()
    if batch.return_logits:
        assert len(batch.sampling) == 0
    else:
        assert len(batch.sampling) == len(batch.output_rows)


def generate(prompt: list[int], n: int, n_stages: int = 1, **row: float) -> list[int]:
    """What the toy model says to `prompt` alone, with no cache and no batch. `row`: seed, temperature."""
    tokens = list(prompt)
    for draw in range(n):
        values = np.array(tokens, np.int64)
        for stage in range(n_stages):
            values = _hidden(values, stage)
        tokens.append(_token(int(values[-1]), int(row.get("seed", 0)), draw, row.get("temperature", 0.0), 0))
    return tokens[len(prompt) :]


def logits(values: np.ndarray) -> np.ndarray:
    """float32 (n, N_VOCAB) of last-stage hidden states (n,)."""
    mixed = (values[:, None] * 7919 + np.arange(N_VOCAB)[None, :] * 104729) % _PRIME
    return (mixed / _PRIME).astype(np.float32)


def _hidden(values: np.ndarray, stage: int) -> np.ndarray:
    weights = (np.arange(len(values)) * 31 + 17 + stage) % 1009
    return np.cumsum(values * weights + 1) % _PRIME


def _token(hidden: int, seed: int, draw: int, temperature: float, adjustment: int) -> int:
    if temperature == 0:
        return int(np.argmax(logits(np.array([hidden + adjustment]))[0]))
    return (hidden * 31 + seed * 7 + draw * 131 + adjustment) % N_VOCAB
