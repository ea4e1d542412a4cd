"""Redshard beside llama.cpp on one model, in one run: prompt, decode and batch throughput, and their ratios.

    python tests/benchmarks/compare_llama_cpp.py MODEL.gguf --llama-cpp FOLDER_OF_ITS_BINARIES --threads 2

Rounds alternate between the two, so that a noisy machine disturbs both alike; medians are shown. llama.cpp
must be built for the instruction sets of this machine; it needs its llama-bench and llama-batched-bench.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from redshard.cluster.commands.bench import Throughput, measure_once
from redshard.cluster.commands.loading import loaded_model
from redshard.worker.device.bandwidth import host_read_bandwidth

PROMPT, TOKENS, SEQUENCES = 512, 64, 16
MEASURES = ("prompt", "decode", "batch")


def llama_cpp(folder: Path, model: Path, threads: int) -> Throughput:
    """One round of llama-bench's pp512 and tg64 and of 16 sequences in llama-batched-bench."""
    common = ["-m", str(model), "-t", str(threads)]
    bench = [folder / "llama-bench", *common, "-p", str(PROMPT), "-n", str(TOKENS), "-r", "1", "-o", "json"]
    prompt, decode = (test["avg_ts"] for test in json.loads(_run(bench)))
    batched = [folder / "llama-batched-bench", *common, "-c", "4096", "-npp", "1", "-ntg", str(TOKENS)]
    lines = _run([*batched, "-npl", str(SEQUENCES), "--output-format", "jsonl"]).splitlines()
    (batch,) = (json.loads(line)["speed_tg"] for line in lines if line.startswith("{"))
    return Throughput(prompt, decode, batch)


def _run(command: list[str | Path]) -> str:
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp's binaries")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    bandwidth = host_read_bandwidth(options.threads)
    console = Console()
    console.print(
        f"{options.threads} threads; memory read at {bandwidth / 1e9:.1f} GB/s; {options.rounds} rounds"
    )
    for model in options.models:
        console.print(compare(model, options.llama_cpp, options.threads, options.rounds, bandwidth))


def compare(model: Path, folder: Path, threads: int, rounds: int, bandwidth: float) -> Table:
    """Both on one model, in turn; the medians."""
    ours, theirs = [], []
    limits = {"max_context": PROMPT + TOKENS + 2, "max_sequences": SEQUENCES}
    with loaded_model(str(model), **limits) as loaded:
        rng = np.random.default_rng(0)
        measure_once(loaded.llm, rng, PROMPT, TOKENS, SEQUENCES)
        for _ in range(rounds):
            theirs.append(llama_cpp(folder, model, threads))
            ours.append(measure_once(loaded.llm, rng, PROMPT, TOKENS, SEQUENCES))
        bytes_per_token = loaded.llm.stats()["workers"][0]["weight_bytes_per_token"]
    table = Table(
        "measure", "Redshard tok/s", "llama.cpp tok/s", "ratio", title=model.stem, title_justify="left"
    )
    for name in MEASURES:
        a = statistics.median(getattr(rates, name) for rates in ours)
        b = statistics.median(getattr(rates, name) for rates in theirs)
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}")
    table.add_row("decode limit by memory", f"{bandwidth / bytes_per_token:.1f}", "", "")
    return table


if __name__ == "__main__":
    main()
