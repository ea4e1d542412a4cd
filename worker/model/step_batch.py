"""What flows through the stages: one step's tokens going in, sampled tokens or logits coming out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from redshard.worker.device.arguments import Adjustment, SamplingRow

SAMPLING_ROW_DTYPE = np.dtype(SamplingRow)
ADJUSTMENT_DTYPE = np.dtype(Adjustment)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass over tokens of some sequences; rows of a sequence are adjacent, positions ascending.

    Attributes:
        step_id: number of the step, ascending, for logs and for matching results.
        token_ids: int32 (n_tokens,)
        positions: int32 (n_tokens,), place of each token in its sequence.
        query_starts: int32 (n_sequences + 1,), the tokens of sequence s are rows
            query_starts[s]:query_starts[s + 1].
        block_tables: int32 (n_sequences, width), cache block numbers; unused entries are -1.
        output_rows: int32 (n_outputs,), rows whose logits are wanted.
        sampling: SAMPLING_ROW_DTYPE (n_outputs,); empty when only logits are wanted.
        adjustments: ADJUSTMENT_DTYPE (n,), the sampling rows' bias and penalty entries.
        n_top: how many most probable tokens to report per output row, 0 to 20.
        return_logits: give raw logits instead of sampled tokens.
    """

    step_id: int
    token_ids: np.ndarray
    positions: np.ndarray
    query_starts: np.ndarray
    block_tables: np.ndarray
    output_rows: np.ndarray
    sampling: np.ndarray = field(default_factory=lambda: np.empty(0, SAMPLING_ROW_DTYPE))
    adjustments: np.ndarray = field(default_factory=lambda: np.empty(0, ADJUSTMENT_DTYPE))
    n_top: int = 0
    return_logits: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the last stage gives back for the output rows of a `StepBatch`.

    Attributes:
        step_id: of the batch.
        tokens: int32 (n_outputs,); empty when logits were wanted.
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
