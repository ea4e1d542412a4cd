"""The line of figures at the end of a run: how fast, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from redshard.cluster.completion import CompletionChunk
from redshard.loader.units import format_bytes


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one batch of prompts.

    Attributes:
        load_s: seconds until the model was ready.
        prompt_tokens, generated_tokens: of all prompts together.
        prompt_tokens_per_s: up to the moment when every prompt had its first token.
        decode_tokens_per_s: tokens after the first ones, from the earliest first token to the end; 0 if none.
        worker_bytes: what each worker holds on its device.
    """

    load_s: float
    prompt_tokens: int
    generated_tokens: int
    prompt_tokens_per_s: float
    decode_tokens_per_s: float
    worker_bytes: list[int]

    def __str__(self) -> str:
        workers = " + ".join(format_bytes(nbytes) for nbytes in self.worker_bytes)
        return (
            f"loaded in {self.load_s:.1f} s | prompt {self.prompt_tokens} tokens, "
            f"{self.prompt_tokens_per_s:.1f} tok/s | generated {self.generated_tokens} tokens, "
            f"decode {self.decode_tokens_per_s:.1f} tok/s | workers hold {workers}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Stopwatch:
    """Times a batch of prompts by the chunks of `LLM.stream`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first: dict[int, float] = {}
        self._last = self._start
        self._prompt_tokens = self._generated = 0

    def watch(self, chunks: Iterable[CompletionChunk]) -> Iterator[CompletionChunk]:
        """The same chunks, noted as they pass."""
        for chunk in chunks:
            self._last = time.perf_counter()
            self._first.setdefault(chunk.index, self._last)
            self._generated += len(chunk.token_ids)
            if chunk.usage is not None:
                self._prompt_tokens += chunk.usage.prompt_tokens
            yield chunk

    def figures(self, load_s: float, worker_bytes: list[int]) -> Figures:
        """What was seen so far."""
        prompt_s = max(self._first.values(), default=self._last) - self._start
        decode_s = self._last - min(self._first.values(), default=self._last)
        decoded = self._generated - len(self._first)
        return Figures(
            load_s=load_s,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            prompt_tokens_per_s=self._prompt_tokens / prompt_s if prompt_s else 0.0,
            decode_tokens_per_s=decoded / decode_s if decode_s else 0.0,
            worker_bytes=worker_bytes,
        )
