"""The whole product beside its worker alone, and llama.cpp where it is given: tokens a second, in one run.

    python tests/benchmarks/compare_worker.py MODEL.gguf --device cuda --sequences 1,16,64 --llama-cpp FOLDER

The worker is `bench_worker.py`, the product `redshard bench`: Ray, scheduler, detokenizer and all. They take
turns, each in a process of its own, so that a noisy machine disturbs all alike; medians are shown. llama.cpp
needs its llama-bench and llama-batched-bench.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent

#: Tokens a second by what was measured: "prompt", or a number of sequences.
Rates = dict[str, float]


def worker(options: argparse.Namespace) -> Rates:
    """One run of the worker alone."""
    command = [sys.executable, HERE / "bench_worker.py", options.model, "--device", options.device]
    batches = ",".join(map(str, options.sequences))
    report = json.loads(_run([*command, "--prompt", options.prompt, "--batches", batches]))
    rates = {str(n): report[f"decode_{n}_tok_s"] for n in options.sequences}
    return {"prompt": report["prompt_tok_s"], **rates}


def product(options: argparse.Namespace) -> Rates:
    """One run of the product; one sequence is measured beside each number of them."""
    rates: Rates = {}
    for n in options.sequences if options.sequences != [1] else [2]:
        if n == 1:
            continue
        command = [sys.executable, "-m", "redshard", "bench", options.model, "--device", options.device]
        sizes = ["--prompt", options.prompt, "--tokens", options.tokens, "--sequences", n, "--rounds", 3]
        report = json.loads(_run([*command, "--stages", options.stages, *sizes, "--json"]))
        rates |= {"prompt": report["throughput"]["prompt"], "1": report["throughput"]["decode"]}
        rates[str(n)] = report["throughput"]["batch"]
        _note(f"{n} sequences, a decode step of one, us: {report['overheads_us']}")
    return rates


def llama_cpp(options: argparse.Namespace) -> Rates:
    """One run of llama.cpp's own benchmarks, with all layers on the GPU and flash attention."""
    common = ["-m", options.model, "-ngl", 99, "-fa", 1]
    batch = ["-b", options.prompt, "-ub", options.prompt]
    bench = [options.llama_cpp / "llama-bench", *common, *batch, "-p", options.prompt, "-n", options.tokens]
    prompt, decode = (test["avg_ts"] for test in json.loads(_run([*bench, "-r", 3, "-o", "json"])))
    rates = {"prompt": prompt, "1": decode}
    for n in options.sequences:
        if n > 1:
            batched = [options.llama_cpp / "llama-batched-bench", *common, "-c", n * (options.tokens + 64)]
            sizes = ["-npp", 16, "-ntg", options.tokens, "-npl", n, "--output-format", "jsonl"]
            lines = _run([*batched, *sizes]).splitlines()
            (rates[str(n)],) = (json.loads(line)["speed_tg"] for line in lines if line.startswith("{"))
    return rates


def _run(command: list[object]) -> str:
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}")
    return process.stdout


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--stages", type=int, default=1, help="of the product; the worker is always one")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's binaries")
    options = parser.parse_args()
    ways: dict[str, Callable[[argparse.Namespace], Rates]] = {"worker": worker, "product": product}
    if options.llama_cpp:
        ways["llama.cpp"] = llama_cpp
    rounds: dict[str, list[Rates]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, measure in ways.items():
            rounds[name].append(measure(options))
            _note(f"{name}: {rounds[name][-1]}")
    table = Table("tok/s", *ways, "product / worker", title=options.model.stem)
    for what in ("prompt", *map(str, options.sequences)):
        medians = [statistics.median(one[what] for one in rounds[name]) for name in ways]
        table.add_row(what, *(f"{rate:,.0f}" for rate in medians), f"{medians[1] / medians[0]:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
