"""What flows through the stages: one step's tokens going in, sampled tokens or logits coming out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from redshard.worker.device.arguments import Adjustment, SamplingRow

SAMPLING_ROW_DTYPE = np.dtype(SamplingRow)
ADJUSTMENT_DTYPE = np.dtype(Adjustment)
#: Block `block` comes to column `column` of the block table in row `row`.
TABLE_ENTRY_DTYPE = np.dtype([("row", np.int32), ("column", np.int32), ("block", np.int32)])
#: Adjustment number `index` of the sequence in `slot` is now this one.
ADJUSTMENT_CHANGE_DTYPE = np.dtype(
    [("slot", np.int32), ("index", np.int32), ("adjustment", ADJUSTMENT_DTYPE)], align=True
)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass over tokens of some sequences; rows of a sequence are adjacent, positions ascending.

    What a sequence keeps from step to step, its block table and its adjustments, stays with the stages, by
    its slot; a batch brings what has changed. Changes hold even if the batch itself is refused.

    Attributes:
        step_id: number of the step, ascending, for logs and for matching results.
        token_ids: int32 (n_tokens,); -1 - s stands for the token that was sampled last in slot s, which only
            a stage that also samples can look up.
        positions: int32 (n_tokens,), place of each token in its sequence.
        query_starts: int32 (n_sequences + 1,), the tokens of sequence s are rows
            query_starts[s]:query_starts[s + 1].
        slots: int32 (n_sequences,), where each sequence's block table and adjustments are kept.
        table_entries: TABLE_ENTRY_DTYPE (n,), block table entries to set before the step.
        output_rows: int32 (n_outputs,), rows whose logits are wanted.
        sampling: SAMPLING_ROW_DTYPE (n_outputs,); empty when only logits are wanted. A row's adjustments are
            those with the numbers `first_adjustment` (0) to `end_adjustment` - 1 of its slot.
        adjustment_changes: ADJUSTMENT_CHANGE_DTYPE (n,), to make before the step.
        n_top: how many most probable tokens to report per output row, 0 to 20.
        return_logits: give raw logits instead of sampled tokens.
    """

    step_id: int
    token_ids: np.ndarray
    positions: np.ndarray
    query_starts: np.ndarray
    slots: np.ndarray
    table_entries: np.ndarray
    output_rows: np.ndarray
    sampling: np.ndarray = field(default_factory=lambda: np.empty(0, SAMPLING_ROW_DTYPE))
    adjustment_changes: np.ndarray = field(default_factory=lambda: np.empty(0, ADJUSTMENT_CHANGE_DTYPE))
    n_top: int = 0
    return_logits: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage gives back for the output rows of a `StepBatch`.

    Attributes:
        step_id: of the batch.
        tokens: int32 (n_outputs,), -1 where the logits are not finite; empty when logits were wanted.
        logprobs: float32 (n_outputs,), natural logarithm of the model's probability of each token.
        top_tokens: int32 (n_outputs, n_top); top_logprobs: float32 (n_outputs, n_top).
        logits: float32 (n_outputs, n_vocab), or None.
    """

    step_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    top_tokens: np.ndarray
    top_logprobs: np.ndarray
    logits: np.ndarray | None = None
