"""Workers chained by hand in one process, and the steps that tests send through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.worker.device.base import Device
from redshard.worker.device.choose import open_device
from redshard.worker.model.step_batch import TABLE_ENTRY_DTYPE, StepBatch, StepResult
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart
from redshard.worker.worker import Worker

LIMITS = StepLimits(
    max_tokens=128, max_sequences=8, max_outputs=128, max_context=256, n_kv_blocks=1024, block_size=16
)


class Pipeline:
    """A model split evenly over `n_stages` workers; some have no layers where it has fewer than that.

    Cache blocks are handed out in random order, so a sequence's blocks lie scattered. Workers are made on the
    devices, or given.
    """

    def __init__(
        self,
        path: Path,
        n_stages: int = 1,
        *,
        devices: Sequence[Device] | None = None,
        workers: Sequence[Any] | None = None,
        limits: StepLimits = LIMITS,
        handoff: str = "float32",
        seed: int = 0,
    ) -> None:
        with GGUFFile.open(path) as file:
            n_layers = read_config(file).n_layers
        parts = split(n_layers, n_stages)
        self.limits = limits
        devices = devices or [open_device("cpu", 2) for _ in (parts if workers is None else ())]
        self.workers = workers or [Worker(device) for device in devices]
        for worker, part in zip(self.workers, parts, strict=True):
            worker.load(path, part, limits, handoff=handoff)
        self._free = list(np.random.default_rng(seed).permutation(limits.n_kv_blocks))
        self._step_id = 0

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for worker in self.workers:
            worker.close()

    def batch(self, pieces: Sequence[tuple[CachedSequence, Sequence[int]]]) -> StepBatch:
        """A step of the next tokens of several sequences, every row an output. Advances the sequences."""
        starts = np.cumsum([0, *(len(tokens) for _, tokens in pieces)], dtype=np.int32)
        entries, positions = [], []
        for slot, (sequence, tokens) in enumerate(pieces):
            positions.append(sequence.length + np.arange(len(tokens), dtype=np.int32))
            sequence.length += len(tokens)
            while len(sequence.blocks) * self.limits.block_size < sequence.length:
                sequence.blocks.append(self._free.pop())
            entries += [(slot, column, block) for column, block in enumerate(sequence.blocks)]
        self._step_id += 1
        return StepBatch(
            step_id=self._step_id,
            token_ids=np.concatenate([tokens for _, tokens in pieces]).astype(np.int32),
            positions=np.concatenate(positions),
            query_starts=starts,
            slots=np.arange(len(pieces), dtype=np.int32),
            table_entries=np.array(entries, TABLE_ENTRY_DTYPE),
            output_rows=np.arange(starts[-1], dtype=np.int32),
        )

    def run(self, batch: StepBatch) -> StepResult:
        """A step through all stages."""
        values = None
        for worker in self.workers:
            stage = worker.stage if isinstance(worker, Worker) else worker
            values = stage.run(batch, values)
        assert isinstance(values, StepResult)
        return values

    def logits(self, *pieces: tuple[CachedSequence, Sequence[int]]) -> list[np.ndarray]:
        """One step; logits of every row, (len(tokens), n_vocab) for each piece."""
        batch = replace(self.batch(pieces), return_logits=True)
        result = self.run(batch)
        assert result.logits is not None
        return np.split(result.logits, batch.query_starts[1:-1])

    def logits_in_chunks(self, tokens: np.ndarray, *lengths: int) -> np.ndarray:
        """A new sequence in chunks of these lengths, then the rest at once: logits of all its rows."""
        sequence = CachedSequence()
        chunks = [chunk for chunk in np.split(tokens, np.cumsum(lengths)) if len(chunk)]
        return np.concatenate([self.logits((sequence, chunk))[0] for chunk in chunks])


def split(n_layers: int, n_stages: int) -> list[StagePart]:
    """Layers over stages, evenly; where there are fewer, the first stage and then the last ones have none."""
    if n_layers < n_stages:
        counts = [0, *[1] * n_layers, *[0] * (n_stages - n_layers - 1)]
    else:
        counts = [n_layers * (i + 1) // n_stages - n_layers * i // n_stages for i in range(n_stages)]
    ends = [0, *accumulate(counts)]
    return [
        StagePart(range(first, end), stage == 0, stage == n_stages - 1)
        for stage, (first, end) in enumerate(pairwise(ends))
    ]


class CachedSequence:
    """A sequence's blocks in the cache, and how many of its tokens lie there."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.length = 0


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """||ours - reference|| / ||reference|| over all elements."""
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
