"""What goes into the engine and what comes out of it, in plain data that can travel between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from redshard.cluster.completion import TokenLogprob
from redshard.cluster.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete, or to give logits of.

    Attributes:
        request_id: like no other in the cluster.
        tokens: of the prompt.
        params: how to go on.
        seed: of the draws; what `params.seed` says, or a fresh one.
        stream: report every step; otherwise once, at the end.
        wants_logits: give the logits of every position and generate nothing.
        client: whose polls give the increments.
    """

    request_id: str
    tokens: list[int]
    params: SamplingParams
    seed: int = 0
    stream: bool = False
    wants_logits: bool = False
    client: str = ""


@dataclass(slots=True)
class Increment:
    """What a request has got since its last increment.

    Attributes:
        request_id: whose.
        text: that follows what came before; bytes that may still become a character are held back.
        token_ids: the tokens generated.
        logprobs: one for each of them, where asked for.
        finish_reason: on the last increment "stop" (end of generation, stop token or string) or "length".
        error: on the last increment of a request that failed.
        logits: float32 (n, n_vocab), of a request for logits those of positions `logits_start` and on. Its
            last increment ends with the finish reason "stop".
        logits_start: see `logits`.
        first_token_s: seconds from arrival to the first token, on the increment that holds it.
        total_s: seconds from arrival to the end, on the last increment.
    """

    request_id: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    logits: np.ndarray | None = None
    logits_start: int = 0
    first_token_s: float | None = None
    total_s: float | None = None

    @property
    def ending(self) -> str | None:
        """The finish reason, "error" for a request that failed, None where more follows."""
        return "error" if self.error is not None else self.finish_reason

    @property
    def is_last(self) -> bool:
        """Whether the request has ended."""
        return self.finish_reason is not None or self.error is not None
