"""A model on two GPUs of one host, without Ray: tokens beside those of one GPU, handoffs, and throughput.

    python tests/benchmarks/bench_two_gpus.py MODEL.gguf --device cuda

Each stage is a process of its own, tied to the next by a pipe; hidden states go through host memory and then
from device to device. A part that fails is reported, and the next one begins. Ends in time, whatever hangs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np

# Run as a script, this file sees neither the project nor the tests' helpers.
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from support.stage_chain import Chain  # noqa: E402
from support.stage_process import connect  # noqa: E402

from redshard.loader.gguf.gguf_file import GGUFFile  # noqa: E402
from redshard.loader.model.architectures import read_config  # noqa: E402
from redshard.loader.model.configuration import ModelConfig  # noqa: E402
from redshard.worker.model.step_batch import SAMPLING_ROW_DTYPE, TABLE_ENTRY_DTYPE, StepBatch  # noqa: E402
from redshard.worker.model.step_inputs import StepLimits  # noqa: E402
from redshard.worker.model.weights import StagePart  # noqa: E402

BLOCK = 32
MICRO_BATCHES = (1, 2, 4)
HANDOFF_ROWS = (1, 16, 64, 512)
PROMPTS = (1, 7, 33, 129, 300, 517)
SHORT_PROMPT = 32
WARM_UP_STEPS = 4
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "hip": "HIP_VISIBLE_DEVICES", "cpu": "UNUSED"}


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and until when.

    Attributes:
        gpus: names of two GPUs, as the variable that chooses them has it.
        sequences: of a micro-batch; steps: decode steps of a measurement; repeats: handoffs of one.
        ends: of the monotonic clock.
    """

    model: Path
    config: ModelConfig
    kind: str
    gpus: tuple[str, str]
    limits: StepLimits
    sequences: int
    steps: int
    repeats: int
    ends: float

    def left(self) -> float:
        """Seconds that may still be waited."""
        return max(0.1, self.ends - time.monotonic())

    def halves(self) -> list[StagePart]:
        """Half of the layers each."""
        n_layers = self.config.n_layers
        return [
            StagePart(range(n_layers // 2), is_first=True, is_last=False),
            StagePart(range(n_layers // 2, n_layers), is_first=False, is_last=True),
        ]

    def ends_only(self) -> list[StagePart]:
        """No layers: the embedding on one stage, the output on the other."""
        end = self.config.n_layers
        return [
            StagePart(range(0), is_first=True, is_last=False),
            StagePart(range(end, end), is_first=False, is_last=True),
        ]

    def chain(self, parts: list[StagePart], alone: bool = False) -> Chain:
        """Starts stages, each on the first GPU that its process sees; `alone` lets it see no other."""
        seen = [[gpu] if alone else list(dict.fromkeys([gpu, *self.gpus])) for gpu in self.gpus]
        environments = [{VISIBLE[self.kind]: ",".join(gpus)} for gpus in seen[: len(parts)]]
        chain = Chain(self.kind, environments, self.ends)
        chain.load(self.model, parts, self.limits)
        return chain


class Sequence:
    """Tokens of a sequence, how many of them lie in the cache, and where: `width` blocks for each slot."""

    def __init__(self, prompt: np.ndarray, slot: int, width: int) -> None:
        self.tokens = [int(token) for token in prompt]
        self.n_prompt = len(prompt)
        self.n_cached = 0
        self.slot = slot
        self.table_entries = np.empty(width, TABLE_ENTRY_DTYPE)
        self.table_entries["row"], self.table_entries["column"] = slot, np.arange(width)
        self.table_entries["block"] = slot * width + np.arange(width)

    def answer(self) -> list[int]:
        """The tokens that followed the prompt."""
        return self.tokens[self.n_prompt :]


def prompts(bench: Bench, lengths: list[int]) -> list[Sequence]:
    """Sequences of random tokens, the same whenever asked, each with blocks of its own."""
    rng = np.random.default_rng(0)
    width = bench.limits.table_width
    return [
        Sequence(rng.integers(0, bench.config.n_vocab, length), slot, width)
        for slot, length in enumerate(lengths)
    ]


def next_step(sequences: list[Sequence], at_most: int) -> StepBatch:
    """The tokens of each sequence that are not cached yet, at most so many, and a greedy token for each."""
    pieces = [sequence.tokens[sequence.n_cached :][:at_most] for sequence in sequences]
    starts = np.cumsum([0, *map(len, pieces)]).astype(np.int32)
    sampling = np.zeros(len(pieces), SAMPLING_ROW_DTYPE)
    sampling["top_p"] = sampling["repeat_penalty"] = 1
    sampling["slot"] = slots = np.array([sequence.slot for sequence in sequences], np.int32)
    return StepBatch(
        step_id=0,
        token_ids=np.concatenate(pieces).astype(np.int32),
        positions=np.concatenate(
            [s.n_cached + np.arange(len(piece)) for s, piece in zip(sequences, pieces, strict=True)]
        ).astype(np.int32),
        query_starts=starts,
        slots=slots,
        table_entries=np.concatenate(
            [np.empty(0, TABLE_ENTRY_DTYPE), *(s.table_entries for s in sequences if not s.n_cached)]
        ),
        output_rows=starts[1:] - 1,
        sampling=sampling,
    )


def advance(sequences: list[Sequence], batch: StepBatch, tokens: np.ndarray) -> None:
    """Note that a step is done; its token belongs to a sequence that was cached whole."""
    for sequence, n_tokens, token in zip(sequences, np.diff(batch.query_starts), tokens, strict=True):
        sequence.n_cached += int(n_tokens)
        if sequence.n_cached == len(sequence.tokens):
            sequence.tokens.append(int(token))


def run(chain: Chain, groups: list[list[Sequence]], n_steps: int, at_most: int = 1) -> float:
    """So many steps of each group, all groups in flight: seconds."""
    total = n_steps * len(groups)
    chain.begin(total)
    began = time.perf_counter()
    batches = []
    for number in range(total + len(groups)):
        if number >= len(groups):
            done = number - len(groups)
            advance(groups[done % len(groups)], batches[done], chain.collect().tokens)
        if number < total:
            batches.append(next_step(groups[number % len(groups)], at_most))
            chain.submit(batches[-1])
    seconds = time.perf_counter() - began
    chain.end()
    return seconds


def fill_cache(chain: Chain, sequences: list[Sequence], max_tokens: int) -> None:
    """All prompts, each alone."""
    for sequence in sequences:
        run(chain, [[sequence]], -(-sequence.n_prompt // max_tokens), max_tokens)


def answers(bench: Bench, chain: Chain, n_groups: int) -> list[list[int]]:
    """Greedy answers to prompts of odd lengths, decoded together in groups."""
    sequences = prompts(bench, [n for n in PROMPTS if n + bench.steps <= bench.limits.max_context])
    fill_cache(chain, sequences, bench.limits.max_tokens)
    run(chain, [sequences[i::n_groups] for i in range(n_groups)], bench.steps)
    return [sequence.answer() for sequence in sequences]


def throughput(bench: Bench, chain: Chain, n_groups: int, group_size: int) -> tuple[float, list[list[int]]]:
    """Tokens a second of decoding so many groups in flight, and the tokens."""
    sequences = prompts(bench, [SHORT_PROMPT] * (n_groups * group_size))
    fill_cache(chain, sequences, bench.limits.max_tokens)
    groups = [sequences[i * group_size : (i + 1) * group_size] for i in range(n_groups)]
    run(chain, groups, WARM_UP_STEPS)
    seconds = run(chain, groups, bench.steps)
    return len(sequences) * bench.steps / seconds, [sequence.answer() for sequence in sequences]


def handoff_times(bench: Bench, chain: Chain, n_rows: int) -> tuple[float, ...]:
    """Median microseconds of a handoff: in all; to copy and wait; for the message; to copy to its place."""
    first, last = chain.stages
    n_sequences = min(n_rows, bench.sequences)
    lengths = [len(rows) for rows in np.array_split(np.arange(n_rows), n_sequences)]
    batch = next_step(prompts(bench, lengths), n_rows)
    times = []
    for repeats in (max(1, bench.repeats // 10), bench.repeats):
        first.ask("send_rows", batch, repeats)
        last.ask("take_rows", n_rows, repeats)
        times = list(zip(first.answer(bench.left()), last.answer(bench.left()), strict=True))
    marks = np.array([[*sent, *taken] for sent, taken in times])
    wait, message, take = np.median(np.diff(marks), axis=0) * 1e6
    total = statistics.median(marks[:, 3] - marks[:, 0]) * 1e6
    return total, wait, message, take


class Report:
    """Figures of all parts, printed as they come and as tables at the end."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._reference: dict[tuple[str, int], list[list[int]]] = {}
        self._handoffs: list[str] = []
        self._rates: dict[tuple[str, int], float] = {}
        self.failures = 0

    def attempt(self, what: str, part: Callable[[], object]) -> bool:
        """Run a part; an error of it is printed and counted, and False returned."""
        began = time.monotonic()
        try:
            part()
        except Exception as error:
            self.failures += 1
            traceback.print_exc()
            print(f"FAILED: {what}: {type(error).__name__}: {error}", flush=True)
            return False
        print(f"[{what}: {time.monotonic() - began:.1f} s]", flush=True)
        return True

    def one_gpu(self, chain: Chain) -> None:
        """What the other parts are compared with."""
        self._reference["answers", 1] = answers(self._bench, chain, 1)
        for n in MICRO_BATCHES:
            self._rate("one GPU, the same micro-batches", chain, n, self._bench.sequences)
        for n in MICRO_BATCHES:
            rate, _ = throughput(self._bench, chain, 1, n * self._bench.sequences)
            self._note("one GPU, all in one batch", n, rate)

    def two_gpus(self, chain: Chain, way: str) -> None:
        """Tokens, handoffs and throughput of two stages."""
        print(*chain.reaches(), sep="\n", flush=True)
        chain.connect(way, max(MICRO_BATCHES))
        for n_groups in (1, 2):
            self._compare(
                f"answers by {way}, {n_groups} in flight",
                answers(self._bench, chain, n_groups),
                self._reference.get(("answers", 1)),
            )
        for n_rows in [n for n in HANDOFF_ROWS if n <= self._bench.limits.max_tokens]:
            times = handoff_times(self._bench, chain, n_rows)
            figures = " | ".join(f"{microseconds:.0f}" for microseconds in times)
            self._handoffs.append(f"| {n_rows} | {way} | {figures} |")
            print(self._handoffs[-1], flush=True)
        for n in MICRO_BATCHES:
            self._rate(f"two GPUs, {way}", chain, n, self._bench.sequences)

    def print_tables(self) -> None:
        """All figures, as Markdown."""
        n = self._bench.sequences
        print("\nHandoff, median microseconds from the end of the layers to hidden states on the next GPU\n")
        print("| tokens | by | in all | copy and wait | message | copy to its place |")
        print("| ---: | --- | ---: | ---: | ---: | ---: |", *self._handoffs, sep="\n")
        print(f"\nDecoding, tokens a second, micro-batches of {n} sequences\n")
        print("| |", *(f"{count} in flight |" for count in MICRO_BATCHES))
        print("| --- |", *("---: |" for _ in MICRO_BATCHES))
        for what in dict.fromkeys(what for what, _ in self._rates):
            rates = [self._rates.get((what, count)) for count in MICRO_BATCHES]
            print(f"| {what} |", *("|" if rate is None else f"{rate:,.0f} |" for rate in rates))

    def _rate(self, what: str, chain: Chain, n_groups: int, group_size: int) -> None:
        rate, tokens = throughput(self._bench, chain, n_groups, group_size)
        self._note(what, n_groups, rate)
        if len(chain.stages) == 1:
            self._reference["decoding", n_groups] = tokens
        else:
            reference = self._reference.get(("decoding", n_groups))
            self._compare(f"{what}, {n_groups} in flight", tokens, reference)

    def _note(self, what: str, n: int, rate: float) -> None:
        self._rates[what, n] = rate
        print(f"{what}, {n} x {self._bench.sequences} sequences: {rate:,.0f} tokens a second", flush=True)

    def _compare(self, what: str, ours: list[list[int]], reference: list[list[int]] | None) -> None:
        n = sum(map(len, ours))
        if reference is None:
            print(f"{what}: {n} tokens, nothing to compare them with", flush=True)
        elif ours == reference:
            print(f"{what}: {n} tokens, identical to one GPU", flush=True)
        else:
            self.failures += 1
            same = sum(a == b for a, b in zip(ours, reference, strict=True))
            print(f"FAILED: {what}: {same} of {len(ours)} sequences are identical to one GPU", flush=True)


def as_under_ray(bench: Bench) -> None:
    """Processes that see their own GPU alone: does device memory work, and what if the receiver dies?"""
    chain, second = bench.chain(bench.ends_only(), alone=True), None
    try:
        chain.loaded()
        first, last = chain.stages
        works = connect(first, last, 2, timeout=bench.left())
        print("hidden states go through", "device memory" if works else "host memory", flush=True)
        if not works:
            return
        last.close()
        batch = next_step(prompts(bench, [bench.limits.max_tokens]), bench.limits.max_tokens)
        sent = first.call("run", batch, timeout=bench.left())
        print(f"the receiver was killed; the sender lives and gave {sent}", flush=True)
        second = bench.chain(bench.ends_only(), alone=True)
        second.loaded()
        works = connect(first, second.stages[1], 2, timeout=bench.left())
        print("to another receiver they go through", "device memory" if works else "host memory", flush=True)
    finally:
        for one in filter(None, (chain, second)):
            one.close()


def give_up() -> None:
    """End everything at once."""
    print("FAILED: out of time", flush=True)
    for process in active_children():
        process.kill()
    os._exit(1)


def parse() -> tuple[Bench, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=["cuda", "hip", "cpu"], default="hip")
    parser.add_argument("--handoff", choices=["host", "device", "both"], default="both")
    parser.add_argument("--gpus", default="0,1", help="two of them, as the variable that chooses GPUs has it")
    parser.add_argument("--sequences", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=48, help="decode steps of a measurement")
    parser.add_argument("--repeats", type=int, default=200, help="handoffs of a measurement")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a step")
    parser.add_argument("--context", type=int, default=640, help="longer prompts and answers are left out")
    parser.add_argument("--seconds", type=float, default=85, help="after which nothing more is tried")
    options = parser.parse_args()
    with GGUFFile.open(options.model) as file:
        config = read_config(file)
    n_sequences = max(len(PROMPTS), max(MICRO_BATCHES) * options.sequences)
    bench = Bench(
        model=options.model,
        config=config,
        kind=options.device,
        gpus=tuple(options.gpus.split(",", 1)),
        limits=StepLimits(
            max_tokens=max(options.max_tokens, n_sequences),
            max_sequences=n_sequences,
            max_outputs=n_sequences,
            max_context=options.context,
            n_kv_blocks=n_sequences * -(-options.context // BLOCK),
            block_size=BLOCK,
        ),
        sequences=options.sequences,
        steps=options.steps,
        repeats=options.repeats,
        ends=time.monotonic() + options.seconds,
    )
    ways = ["host memory"] if options.device == "cpu" else ["host memory", "device memory"]
    return bench, [way for way in ways if options.handoff in ("both", way.split()[0])]


def main() -> int:
    """Measure and print; the status is 0 if no part failed."""
    bench, ways = parse()
    timer = threading.Timer(bench.left() + 5, give_up)
    timer.daemon = True
    timer.start()
    report = Report(bench)
    whole = StagePart(range(bench.config.n_layers), is_first=True, is_last=True)
    one, two = bench.chain([whole]), bench.chain(bench.halves())
    try:
        if report.attempt("loading on one GPU", one.loaded):
            report.attempt("one GPU", partial(report.one_gpu, one))
        one.close()
        working = report.attempt("loading on two GPUs", two.loaded)
        for way in ways:
            if not working:
                two.close()
                two = bench.chain(bench.halves())
                working = report.attempt("loading once more", two.loaded)
            working = working and report.attempt(f"two GPUs, {way}", partial(report.two_gpus, two, way))
    finally:
        one.close()
        two.close()
    report.print_tables()
    if "device memory" in ways:
        report.attempt("as under Ray", partial(as_under_ray, bench))
    return min(1, report.failures)


if __name__ == "__main__":
    sys.exit(main())
