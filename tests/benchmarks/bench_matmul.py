"""How fast the CPU device multiplies: weight bytes and multiply-accumulates a second, shapes of Qwen2.5-0.5B.

Weights are read from memory, not from a cache: each shape has as many copies as fill 256 MiB, multiplied in
turn. Figures are medians of rounds that go through all cases, so that a noisy machine spoils single rounds
and not single cases.

    python tests/benchmarks/bench_matmul.py --types Q4_0,Q8_0 --rows 1,512 --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import redshard._cpu as _cpu
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import Activation, MatmulArguments, Matrix, Step

SHAPES = [(896, 896), (128, 896), (4864, 896), (896, 4864), (151936, 896)]
COLD_BYTES = 256 << 20
#: Multiply-accumulates of 4-bit and of 8-bit codes in a cycle of a core that does two vector multiplications.
PEAK_PER_CYCLE = {"portable": (8, 8), "avx2": (64, 32), "avx512": (128, 64), "avx512_vnni": (128, 128)}


@dataclass
class Case:
    """One type, shape and number of rows, recorded as a graph of one product for each copy of the weights."""

    quant_type: QuantType
    shape: tuple[int, int]
    rows: int
    graph: _cpu.Graph
    n_products: int
    kept: list[object]  # memory the graph points to
    seconds: list[float] = field(default_factory=list)  # of one product

    def measure(self) -> None:
        start = time.perf_counter()
        self.graph.replay()
        self.seconds.append((time.perf_counter() - start) / self.n_products)

    @property
    def gigabytes_per_second(self) -> float:
        n_rows, width = self.shape
        return self.quant_type.nbytes((n_rows, width)) / statistics.median(self.seconds) / 1e9

    @property
    def gigamacs_per_second(self) -> float:
        return self.shape[0] * self.shape[1] * self.rows / statistics.median(self.seconds) / 1e9


def random_weights(rng: np.random.Generator, quant_type: QuantType, nbytes: int) -> np.ndarray:
    """Bytes whose float16 factors are finite: no code or factor has all its exponent bits set."""
    weights = np.frombuffer(bytearray(rng.bytes(nbytes)), np.uint8)
    if quant_type in (QuantType.F32, QuantType.F16, QuantType.BF16):
        weights &= 0xBB
    else:
        weights.reshape(-1, quant_type.block_bytes)[:] &= 0xBB
    return weights


def make_case(
    runtime: _cpu.Runtime,
    quant_type: QuantType,
    shape: tuple[int, int],
    rows: int,
    memory: np.ndarray,
) -> Case:
    n_rows, width = shape
    nbytes = quant_type.nbytes(shape)
    n_copies = max(1, min(len(memory) // nbytes, 256 if rows < 16 else 2))
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, width), np.float32)
    quants = rng.integers(-127, 128, (rows, width)).astype(np.int8)
    scales = np.ones((rows, width // 32), np.float32)
    step, out = Step(rows, 1, rows, 0), np.zeros((rows, n_rows), np.float32)
    arguments = MatmulArguments()
    arguments.step = ctypes.addressof(step)
    arguments.x = Activation(*(part.ctypes.data for part in (values, quants, scales, scales)))
    arguments.y[0], arguments.n_matrices, arguments.width = out.ctypes.data, 1, width
    products = []
    for copy in range(n_copies):
        arguments.w[0] = Matrix(memory.ctypes.data + copy * nbytes, 0, quant_type.ggml_id, n_rows)
        products.append(("matmul", bytes(arguments)))
    kept = [values, quants, scales, step, out, memory]
    return Case(quant_type, shape, rows, runtime.record(products), n_copies, kept)


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together, the best of some tries."""
    parts = np.array_split(np.ones(COLD_BYTES // 8), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, COLD_BYTES / (time.perf_counter() - start))
    return best


def clock_hertz() -> float:
    """The clock the system reports for its first CPU; virtual machines report a nominal one."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return float(line.split(":")[1]) * 1e6
    return 0.0


def names(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", type=names, default=names("Q4_0,Q8_0,Q4_K,Q6_K,F16"))
    parser.add_argument("--rows", type=names, default=names("1,2,4,16,64,512"))
    parser.add_argument("--shapes", type=names, default=[f"{n}x{width}" for n, width in SHAPES])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    runtime = _cpu.Runtime(options.threads, options.isa)
    rng = np.random.default_rng(0)
    cases = []
    for name in options.types:
        quant_type = QuantType[name]
        whole_blocks = COLD_BYTES // quant_type.block_bytes * quant_type.block_bytes
        memory = random_weights(rng, quant_type, whole_blocks)
        for shape in (tuple(map(int, text.split("x"))) for text in options.shapes):
            n_rows, width = shape
            if width % quant_type.block_elements:
                width += -width % quant_type.block_elements  # K-quants: the next width they can have
            needed = quant_type.nbytes((n_rows, width))
            if needed > len(memory):
                memory = np.resize(memory, needed)
            for rows in map(int, options.rows):
                if n_rows > 100_000 and rows > 16:
                    continue  # only the last token of a prompt gets logits
                cases.append(make_case(runtime, quant_type, (n_rows, width), rows, memory))
    for _ in range(options.rounds):
        for case in cases:
            case.measure()

    bandwidth, clock = read_bandwidth(options.threads), clock_hertz()
    four_bit, eight_bit = (n * clock * options.threads / 1e9 for n in PEAK_PER_CYCLE[runtime.isa])
    console = Console()
    console.print(
        f"{runtime.isa}, {options.threads} threads; memory read at {bandwidth / 1e9:.1f} GB/s; "
        f"peak at {clock / 1e9:.2f} GHz about {four_bit:.0f} (4 bit) and {eight_bit:.0f} (8 bit) GMAC/s"
    )
    table = Table("type", "rows x width", "tokens", "µs", "GB/s", "of memory", "GMAC/s", "of peak")
    for case in cases:
        peak = four_bit if case.quant_type.name.startswith("Q4") else eight_bit
        table.add_row(
            case.quant_type.name,
            "{} x {}".format(*case.shape),
            str(case.rows),
            f"{statistics.median(case.seconds) * 1e6:.0f}",
            f"{case.gigabytes_per_second:.2f}",
            f"{case.gigabytes_per_second * 1e9 / bandwidth:.0%}",
            f"{case.gigamacs_per_second:.1f}",
            f"{case.gigamacs_per_second / peak:.0%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
