"""Where sampled tokens lie on the device, and how they become a `StepResult`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redshard.worker.device.arguments import MAX_TOP_LOGPROBS
from redshard.worker.model.step_batch import StepResult

_NO_TOKENS = np.empty(0, np.int32)
_NO_LOGPROBS = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class SampleAddresses:
    """Device addresses of the results of ``sample``."""

    tokens: int
    logprobs: int
    top_tokens: int
    top_logprobs: int


class SampleOutputs:
    """The results of sampling up to `max_outputs` rows, contiguous so that one copy brings them to the host.

    The most probable tokens come last: a step that wants none copies the first `nbytes(0)` bytes alone.
    """

    def __init__(self, max_outputs: int) -> None:
        self.max_outputs = max_outputs

    def nbytes(self, n_top: int) -> int:
        """Bytes from the start to the end of what a step with `n_top` reads."""
        return 4 * self.max_outputs * (2 + (2 * MAX_TOP_LOGPROBS if n_top else 0))

    def addresses(self, base: int) -> SampleAddresses:
        """Addresses of the results in a device buffer at `base`."""
        column = 4 * self.max_outputs
        return SampleAddresses(
            tokens=base,
            logprobs=base + column,
            top_tokens=base + 2 * column,
            top_logprobs=base + (2 + MAX_TOP_LOGPROBS) * column,
        )

    def read(self, array: np.ndarray, step_id: int, n_outputs: int, n_top: int) -> StepResult:
        """The results of a step, copied from host memory that holds the first `nbytes(n_top)` bytes.

        Args:
            array: uint8.
            step_id: of the batch.
            n_outputs: rows sampled.
            n_top: most probable tokens wanted of each.
        """
        words = array[: self.nbytes(n_top)].view(np.int32)
        columns = words.reshape(-1, self.max_outputs)
        if n_top:
            most = columns[2:].reshape(2, self.max_outputs, MAX_TOP_LOGPROBS)[:, :n_outputs, :n_top].copy()
        else:
            most = np.empty((2, n_outputs, 0), np.int32)
        return StepResult(
            step_id=step_id,
            tokens=columns[0, :n_outputs].copy(),
            logprobs=columns[1, :n_outputs].copy().view(np.float32),
            top_tokens=most[0],
            top_logprobs=most[1].view(np.float32),
        )


def logits_result(step_id: int, logits: np.ndarray) -> StepResult:
    """The result of a step that wanted raw logits: float32 (n_outputs, n_vocab)."""
    no_top = np.empty((len(logits), 0), np.int32)
    return StepResult(step_id, _NO_TOKENS, _NO_LOGPROBS, no_top, no_top.view(np.float32), logits)
