"""Steps, hidden states and results as bytes.

Ray serializes one `bytes` object some hundred times faster than many arrays.

A message is a header of counts, then the arrays back to back; both ends run the same release on machines of
the same byte order. Decoded arrays are read-only views of the message.
"""

from __future__ import annotations

import struct

import numpy as np

from redshard.worker.model.handoff import Hidden, InSlot
from redshard.worker.model.step_batch import (
    ADJUSTMENT_CHANGE_DTYPE,
    SAMPLING_ROW_DTYPE,
    TABLE_ENTRY_DTYPE,
    StepBatch,
    StepResult,
)

_BATCH = struct.Struct("=q8i")  # a multiple of 8 bytes: sampling rows, which come next, are aligned to 8
_HIDDEN = struct.Struct("=3i")
_RESULT = struct.Struct("=q4i")
_IN_SLOT = -1


def encode_batch(batch: StepBatch) -> bytes:
    """A step on its way to the stages."""
    header = _BATCH.pack(
        batch.step_id,
        len(batch.token_ids),
        len(batch.slots),
        len(batch.table_entries),
        len(batch.output_rows),
        len(batch.sampling),
        len(batch.adjustment_changes),
        batch.n_top,
        batch.return_logits,
    )
    arrays = (
        batch.sampling,
        batch.adjustment_changes,
        batch.table_entries,
        batch.token_ids,
        batch.positions,
        batch.query_starts,
        batch.slots,
        batch.output_rows,
    )
    return b"".join([header, *(array.tobytes() for array in arrays)])


def decode_batch(message: bytes) -> StepBatch:
    """The step of `encode_batch`."""
    step_id, n_tokens, n_sequences, n_entries, n_outputs, n_sampling, n_changes, n_top, logits = (
        _BATCH.unpack_from(message)
    )
    reader = _Reader(message, _BATCH.size)
    sampling = reader.take(n_sampling, SAMPLING_ROW_DTYPE)
    changes = reader.take(n_changes, ADJUSTMENT_CHANGE_DTYPE)
    return StepBatch(
        step_id=step_id,
        table_entries=reader.take(n_entries, TABLE_ENTRY_DTYPE),
        token_ids=reader.take(n_tokens, np.int32),
        positions=reader.take(n_tokens, np.int32),
        query_starts=reader.take(n_sequences + 1, np.int32),
        slots=reader.take(n_sequences, np.int32),
        output_rows=reader.take(n_outputs, np.int32),
        sampling=sampling,
        adjustment_changes=changes,
        n_top=n_top,
        return_logits=bool(logits),
    )


def encode_hidden(hidden: Hidden) -> bytes:
    """Hidden states on their way to the next stage: float32 or float16, or where they are."""
    if isinstance(hidden, InSlot):
        return _HIDDEN.pack(_IN_SLOT, hidden.slot, 0)
    return _HIDDEN.pack(*hidden.shape, hidden.itemsize) + hidden.tobytes()


def decode_hidden(message: bytes) -> Hidden:
    """The hidden states of `encode_hidden`."""
    n_tokens, width, itemsize = _HIDDEN.unpack_from(message)
    if n_tokens == _IN_SLOT:
        return InSlot(width)
    return np.frombuffer(message, f"f{itemsize}", n_tokens * width, _HIDDEN.size).reshape(n_tokens, width)


def encode_result(result: StepResult) -> bytes:
    """A result on its way back."""
    logits = np.empty((0, 0), np.float32) if result.logits is None else result.logits
    header = _RESULT.pack(result.step_id, len(result.tokens), result.top_tokens.shape[-1], *logits.shape)
    arrays = (result.tokens, result.logprobs, result.top_tokens, result.top_logprobs, logits)
    return b"".join([header, *(array.tobytes() for array in arrays)])


def decode_result(message: bytes) -> StepResult:
    """The result of `encode_result`."""
    step_id, n, n_top, n_rows, n_vocab = _RESULT.unpack_from(message)
    reader = _Reader(message, _RESULT.size)
    return StepResult(
        step_id=step_id,
        tokens=reader.take(n, np.int32),
        logprobs=reader.take(n, np.float32),
        top_tokens=reader.take(n * n_top, np.int32).reshape(n, n_top),
        top_logprobs=reader.take(n * n_top, np.float32).reshape(n, n_top),
        logits=reader.take(n_rows * n_vocab, np.float32).reshape(n_rows, n_vocab) if n_rows else None,
    )


class _Reader:
    """Cuts arrays off a message, one after the other."""

    def __init__(self, message: bytes, offset: int) -> None:
        self._message, self._offset = message, offset

    def take(self, n: int, dtype: type | np.dtype) -> np.ndarray:
        array = np.frombuffer(self._message, dtype, n, self._offset) if n else np.empty(0, dtype)
        self._offset += array.nbytes
        return array
