"""One worker without Ray on any device: prompt, single-stream and batched decode, beside the device's limits.

    python tests/benchmarks/bench_worker.py MODEL.gguf --device cuda

Needs the project and its extension module on the path, and no Ray, so that it also runs where there is none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.worker.device.base import Device
from redshard.worker.device.choose import open_device
from redshard.worker.model.step_batch import SAMPLING_ROW_DTYPE, TABLE_ENTRY_DTYPE, StepBatch
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart
from redshard.worker.worker import Worker

BLOCK = 32


class Bench:
    """A whole model on one worker, and sequences whose caches lie in blocks of their own."""

    def __init__(self, path: Path, device: Device, max_sequences: int, context: int, prompt: int) -> None:
        with GGUFFile.open(path) as file:
            self.config = read_config(file)
        self.blocks_each = -(-context // BLOCK)
        limits = StepLimits(
            max_tokens=max(prompt, max_sequences),
            max_sequences=max_sequences,
            max_outputs=max_sequences,
            max_context=self.blocks_each * BLOCK,
            n_kv_blocks=self.blocks_each * max_sequences,
            block_size=BLOCK,
        )
        self.worker = Worker(device)
        part = StagePart(range(self.config.n_layers), is_first=True, is_last=True)
        self.stats = self.worker.load(path, part, limits)
        self._rng = np.random.default_rng(0)
        self._table_entries = np.zeros(limits.n_kv_blocks, TABLE_ENTRY_DTYPE)
        self._table_entries["block"] = np.arange(limits.n_kv_blocks)
        self._table_entries["row"], self._table_entries["column"] = np.divmod(
            np.arange(limits.n_kv_blocks), self.blocks_each
        )

    def step(self, n_sequences: int, n_tokens: int, position: int) -> float:
        """Seconds of a step with `n_tokens` of each sequence from `position` on."""
        n = n_sequences * n_tokens
        starts = np.arange(n_sequences + 1, dtype=np.int32) * n_tokens
        sampling = np.zeros(n_sequences, SAMPLING_ROW_DTYPE)
        sampling["repeat_penalty"] = sampling["top_p"] = 1.0
        sampling["slot"] = np.arange(n_sequences)
        batch = StepBatch(
            step_id=0,
            token_ids=self._rng.integers(0, self.config.n_vocab, n).astype(np.int32),
            positions=np.tile(position + np.arange(n_tokens, dtype=np.int32), n_sequences),
            query_starts=starts,
            slots=np.arange(n_sequences, dtype=np.int32),
            table_entries=self._take_table_entries(),
            output_rows=starts[1:] - 1,
            sampling=sampling,
        )
        start = time.perf_counter()
        self.worker.stage.run(batch)
        return time.perf_counter() - start

    def _take_table_entries(self) -> np.ndarray:
        """The blocks of all sequences the first time, nothing afterwards."""
        entries, self._table_entries = self._table_entries, self._table_entries[:0]
        return entries

    def decode(self, n_sequences: int, position: int, steps: int) -> float:
        """Median seconds of a decode step."""
        return statistics.median(self.step(n_sequences, 1, position + i) for i in range(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument(
        "--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 16, 64]
    )
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()

    bench = Bench(
        options.model, open_device(options.device), max(options.batches), options.prompt + 512, options.prompt
    )
    prompts = [bench.step(1, options.prompt, 0) for _ in range(5)]
    report = {
        "model": options.model.stem,
        "device": bench.stats.device,
        "load_s": round(bench.stats.load_s, 2),
        "prompt_tok_s": round(options.prompt / statistics.median(prompts[1:]), 1),
    }
    for n in options.batches:
        bench.decode(n, 32, 8)
        seconds = bench.decode(n, 64, options.steps)
        report[f"decode_{n}_tok_s"] = round(n / seconds, 1)
        report[f"decode_{n}_weights_GB_s"] = round(bench.stats.weight_bytes_per_token / seconds / 1e9, 1)
    print(json.dumps(report, indent=2), flush=True)
    bench.worker.close()


if __name__ == "__main__":
    main()
