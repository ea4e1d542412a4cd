"""Microseconds of the CPU device's operations beside the matrix products, for the shape of Qwen2.5-0.5B.

Each case is a graph of the same operation on the memory of 24 layers, so the cache is read from main memory.
Figures are the median and the least over rounds that go through all cases: noise spoils single rounds.

    python tests/benchmarks/bench_ops.py --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

import redshard._cpu as _cpu
from redshard.worker.device.arguments import (
    Activation,
    AttentionArguments,
    RmsNormArguments,
    RopeStoreArguments,
    SampleArguments,
    SamplingRow,
    Step,
)

N_LAYERS, WIDTH, N_HEADS, N_KV_HEADS, HEAD_DIM, N_VOCAB = 24, 896, 14, 2, 64, 151_936
BLOCK_SIZE = 16


@dataclass
class Case:
    """An operation recorded once for each layer."""

    name: str
    graph: _cpu.Graph
    n_operations: int
    kept: list[object]  # memory the graph points to
    seconds: list[float] = field(default_factory=list)  # of one operation

    def measure(self) -> None:
        start = time.perf_counter()
        self.graph.replay()
        self.seconds.append((time.perf_counter() - start) / self.n_operations)


class Bench:
    """Makes cases for one runtime."""

    def __init__(self, runtime: _cpu.Runtime) -> None:
        self.runtime = runtime
        self.rng = np.random.default_rng(0)

    def case(self, name: str, kernel: str, blocks: list[ctypes.Structure], *kept: object) -> Case:
        operations = [(kernel, bytes(block)) for block in blocks]
        return Case(name, self.runtime.record(operations), len(operations), [*kept, blocks])

    def activation(self, rows: int, width: int) -> tuple[Activation, tuple[np.ndarray, ...]]:
        blocks = (rows, width // 32)
        parts = (
            self.rng.standard_normal((rows, width), np.float32),
            np.zeros((rows, width), np.int8),
            np.zeros(blocks, np.float32),
            np.zeros(blocks, np.float32),
        )
        return Activation(*(part.ctypes.data for part in parts)), parts

    def rms_norm(self, rows: int, width: int = WIDTH) -> Case:
        x, weight = self.rng.standard_normal((rows, width), np.float32), np.ones(width, np.float32)
        out, parts = self.activation(rows, width)
        step = Step(rows, rows, rows, 0)
        block = RmsNormArguments(
            ctypes.addressof(step), x.ctypes.data, 0, weight.ctypes.data, out, width, 1e-6
        )
        return self.case(
            f"rms_norm, {rows} x {width}", "rms_norm", [block] * N_LAYERS, x, weight, parts, step
        )

    def rope_store(self, rows: int) -> Case:
        q, k, v = (
            self.rng.standard_normal((rows, n, HEAD_DIM), np.float32)
            for n in (N_HEADS, N_KV_HEADS, N_KV_HEADS)
        )
        positions = np.arange(rows, dtype=np.int32)
        rotary = np.tile(np.array([0.6, 0.8], np.float32), (rows, HEAD_DIM // 2, 1))
        n_blocks = -(-rows // BLOCK_SIZE)
        caches = np.zeros((2, n_blocks, N_KV_HEADS, BLOCK_SIZE, HEAD_DIM), np.float16)
        step = Step(rows, rows, rows, 0)
        block = RopeStoreArguments(
            step=ctypes.addressof(step),
            positions=positions.ctypes.data,
            slots=positions.ctypes.data,
            q=q.ctypes.data,
            k=k.ctypes.data,
            v=v.ctypes.data,
            rotary=rotary.ctypes.data,
            k_cache=caches[0].ctypes.data,
            v_cache=caches[1].ctypes.data,
            n_heads=N_HEADS,
            n_kv_heads=N_KV_HEADS,
            head_dim=HEAD_DIM,
            value_dim=HEAD_DIM,
            n_rot=HEAD_DIM,
            neox=1,
            block_size=BLOCK_SIZE,
            eps=1e-6,
        )
        kept = (q, k, v, positions, rotary, caches, step)
        return self.case(f"rope_store, {rows} tokens", "rope_store", [block] * N_LAYERS, *kept)

    def attention(self, name: str, n_sequences: int, n_queries: int, context: int) -> Case:
        """Each sequence's last `n_queries` positions of `context`."""
        n_blocks = -(-context // BLOCK_SIZE)
        shape = (N_LAYERS, 2, n_sequences * n_blocks, N_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        caches = self.rng.standard_normal(shape, np.float32).astype(np.float16)
        tables = self.rng.permutation(n_sequences * n_blocks).astype(np.int32).reshape(n_sequences, n_blocks)
        rows = n_sequences * n_queries
        positions = np.tile(np.arange(context - n_queries, context, dtype=np.int32), n_sequences)
        sequences = np.repeat(np.arange(n_sequences, dtype=np.int32), n_queries)
        starts = np.arange(0, rows + 1, n_queries, dtype=np.int32)
        table_rows = np.arange(n_sequences, dtype=np.int32)
        q = self.rng.standard_normal((rows, N_HEADS, HEAD_DIM), np.float32)
        out, parts = self.activation(rows, N_HEADS * HEAD_DIM)
        scratch = np.zeros(_cpu.attention_scratch_bytes(rows, N_HEADS, HEAD_DIM, context), np.uint8)
        step = Step(rows, n_sequences, n_sequences, 0)
        blocks: list[ctypes.Structure] = [
            AttentionArguments(
                step=ctypes.addressof(step),
                positions=positions.ctypes.data,
                sequences=sequences.ctypes.data,
                query_starts=starts.ctypes.data,
                table_rows=table_rows.ctypes.data,
                block_tables=tables.ctypes.data,
                q=q.ctypes.data,
                k_cache=keys.ctypes.data,
                v_cache=values.ctypes.data,
                out=out,
                scratch=scratch.ctypes.data,
                scratch_bytes=scratch.nbytes,
                n_heads=N_HEADS,
                n_kv_heads=N_KV_HEADS,
                head_dim=HEAD_DIM,
                value_dim=HEAD_DIM,
                block_size=BLOCK_SIZE,
                table_width=n_blocks,
                scale=HEAD_DIM**-0.5,
                max_sequences=n_sequences,
            )
            for keys, values in caches
        ]
        kept = (caches, tables, table_rows, positions, sequences, starts, q, parts, scratch, step)
        return self.case(f"attention, {name}", "attention", blocks, *kept)

    def sample(self, name: str, rows: int, n_top: int = 0, **settings: float) -> Case:
        logits = (self.rng.standard_normal((rows, N_VOCAB)) * 3).astype(np.float32)
        sampling = (SamplingRow * rows)(
            *(SamplingRow(seed=i, repeat_penalty=1, **{"top_p": 1, **settings}) for i in range(rows))
        )
        tokens, logprobs = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
        top = np.zeros((2, rows, 20), np.int32)
        newest = np.zeros(rows, np.int32)
        step = Step(rows, rows, rows, 0)
        block = SampleArguments(
            step=ctypes.addressof(step),
            logits=logits.ctypes.data,
            rows=ctypes.addressof(sampling),
            newest=newest.ctypes.data,
            tokens=tokens.ctypes.data,
            logprobs=logprobs.ctypes.data,
            top_tokens=top[0].ctypes.data,
            top_logprobs=top[1].ctypes.data,
            n_vocab=N_VOCAB,
            n_top=n_top,
        )
        kept = (logits, sampling, newest, tokens, logprobs, top, step)
        return self.case(f"sample, {rows} x {N_VOCAB}, {name}", "sample", [block], *kept)


def all_cases(bench: Bench) -> list[Case]:
    return [
        bench.rms_norm(0),  # what an operation costs before it does anything
        bench.rms_norm(1, 8192),
        bench.rms_norm(
            2, 8192
        ),  # a loop of two chunks: on two threads the difference to one row is the barrier
        bench.rms_norm(1),
        bench.rms_norm(16),
        bench.rms_norm(512),
        bench.rope_store(1),
        bench.rope_store(16),
        bench.rope_store(512),
        *(bench.attention(f"1 token at {context}", 1, 1, context) for context in (1, 128, 1024, 4096)),
        bench.attention("16 sequences at 1024", 16, 1, 1024),
        bench.attention("prompt of 512", 1, 512, 512),
        bench.attention("chunk of 64 at 4096", 1, 64, 4096),
        bench.sample("greedy", 1),
        bench.sample("greedy", 16),
        bench.sample("greedy, 20 top", 1, n_top=20),
        bench.sample("temperature", 1, temperature=0.8),
        bench.sample("top-k 40, top-p 0.95", 1, temperature=0.8, top_k=40, top_p=0.95),
        bench.sample("top-p 0.95", 1, temperature=0.8, top_p=0.95),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    runtime = _cpu.Runtime(options.threads, options.isa)
    cases = all_cases(Bench(runtime))
    for _ in range(options.rounds):
        for case in cases:
            case.measure()
    table = Table("operation", "median µs", "least µs", title=f"{runtime.isa}, {runtime.n_threads} threads")
    for case in cases:
        median, least = statistics.median(case.seconds) * 1e6, min(case.seconds) * 1e6
        table.add_row(case.name, f"{median:.1f}", f"{least:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
