"""Where a step's time goes on a GPU: every operation of a whole model's step, replayed as a graph of its own.

    python tests/benchmarks/bench_gpu_ops.py MODEL.gguf --device cuda --sequences 1,64 --prompt 2048

An operation's graph has its launches of all layers, so its weights come from memory and not from a cache.
Bytes are those of the weights that it reads, operations two for each weight and row. The limit is measured in
the same run: a copy on the device (bytes read and written). Needs no Ray.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench_worker import Bench
from rich.console import Console
from rich.table import Table

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import MatmulArguments, Matrix, SwigluArguments
from redshard.worker.device.base import Device, Graph
from redshard.worker.device.choose import open_device

_TYPES = {quant_type.ggml_id: quant_type for quant_type in QuantType}
_REPLAYS, _TRIES = 10, 7
_POSITION = 128  # where decoding is measured


@dataclass(frozen=True)
class Call:
    """One operation as the model launches it."""

    operation: str
    arguments: ctypes.Structure
    rows: int

    @property
    def matrices(self) -> list[Matrix]:
        a = self.arguments
        if isinstance(a, MatmulArguments):
            return [a.w[m] for m in range(a.n_matrices)]
        return [a.gate, a.up] if isinstance(a, SwigluArguments) else []

    @property
    def name(self) -> str:
        """The operation with its matrices; calls of one name are measured together."""
        if not self.matrices:
            return self.operation
        parts = [f"{m.n_rows} {_TYPES[m.type].name}" for m in self.matrices]
        return f"{self.operation} {self.arguments.width} -> {' + '.join(parts)}"

    @property
    def weights(self) -> int:
        return sum(matrix.n_rows * self.arguments.width for matrix in self.matrices)

    @property
    def weight_bytes(self) -> float:
        return sum(_TYPES[m.type].nbytes((m.n_rows, self.arguments.width)) for m in self.matrices)


class Calls:
    """Keeps what a device is asked to launch."""

    def __init__(self, device: Device) -> None:
        self.all: list[Call] = []
        self._launch, self._device = device.launch, device
        device.launch = self._keep  # type: ignore[method-assign]

    def stop(self) -> None:
        self._device.launch = self._launch  # type: ignore[method-assign]

    def of_step(self, n_tokens: int, n_outputs: int) -> list[Call]:
        """One step's, in order: each graph that a stage records begins with the same operation."""
        layers, logits, sampling = self._runs()
        return [*layers[n_tokens], *logits[n_outputs], *sampling[n_outputs]]

    def _runs(self) -> tuple[dict[int, list[Call]], dict[int, list[Call]], dict[int, list[Call]]]:
        layers: dict[int, list[Call]] = {}
        logits: dict[int, list[Call]] = {}
        sampling: dict[int, list[Call]] = {}
        for call in self.all:
            of_outputs = getattr(call.arguments, "over_outputs", 0) or getattr(call.arguments, "rows", None)
            if call.operation == "sample":
                sampling.setdefault(call.rows, [call])  # the first graphs rank no tokens
            else:
                (logits if of_outputs else layers).setdefault(call.rows, []).append(call)
        return layers, logits, sampling

    def _keep(self, kernel: str, arguments: ctypes.Structure, rows: int) -> None:
        self.all.append(Call(kernel, type(arguments).from_buffer_copy(arguments), rows))
        self._launch(kernel, arguments, rows)


def seconds_of(device: Device, work: Callable[[], object]) -> float:
    """Median seconds of `work`, queued several times back to back."""
    times = []
    for _ in range(_TRIES + 1):
        start = time.perf_counter()
        for _ in range(_REPLAYS):
            work()
        device.synchronize()
        times.append((time.perf_counter() - start) / _REPLAYS)
    return statistics.median(times[1:])


def seconds_of_graph(device: Device, calls: list[Call]) -> float:
    """Median seconds of these calls as one graph."""
    graphs: list[Graph] = []
    with device.recording(graphs):
        for call in calls:
            device.launch(call.operation, call.arguments, call.rows)
    seconds = seconds_of(device, graphs[0].replay)
    graphs[0].release()
    return seconds


def copy_bandwidth(device: Device) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    nbytes = 4 << 30
    source, destination = device.allocate(nbytes), device.allocate(nbytes)
    device.fill(source, 0x5A, nbytes)
    seconds = seconds_of(device, lambda: device.copy(destination, source, nbytes))
    device.free(source)
    device.free(destination)
    return 2 * nbytes / seconds


def report(title: str, device: Device, calls: list[Call], limit: float, step: float) -> None:
    """A table: the operations of a step, their sum, the step as one graph, and as a worker runs it."""
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(call.name, []).append(call)
    table = Table(title=title)
    for heading in ("operation", "times", "us each", "us a step", "GB/s", "of a copy", "TFLOP/s"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    total = 0.0
    for name, members in groups.items():
        seconds = seconds_of_graph(device, members)
        total += seconds
        rates = ["", "", ""]
        if members[0].weights:
            rate = sum(call.weight_bytes for call in members) / seconds
            flops = 2 * sum(call.weights * call.rows for call in members) / seconds
            rates = [f"{rate / 1e9:.0f}", f"{rate / limit:.0%}", f"{flops / 1e12:.1f}"]
        each = seconds / len(members)
        table.add_row(name, str(len(members)), f"{each * 1e6:.2f}", f"{seconds * 1e6:.0f}", *rates)
    table.add_section()
    whole = seconds_of_graph(device, calls)
    for name, seconds in (("sum", total), ("one graph", whole), ("worker's step", step)):
        rate = sum(call.weight_bytes for call in calls) / seconds
        table.add_row(
            name, str(len(calls)), "", f"{seconds * 1e6:.0f}", f"{rate / 1e9:.0f}", f"{rate / limit:.0%}"
        )
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt; 0 for none")
    parser.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[1, 64])
    options = parser.parse_args()

    prompt = options.prompt or _POSITION
    device = open_device(options.device)
    calls = Calls(device)
    bench = Bench(options.model, device, max(options.sequences), prompt + 512, prompt)
    calls.stop()
    limit = copy_bandwidth(device)
    print(f"{options.model.stem} on {bench.stats.device}; a copy moves {limit / 1e9:.0f} GB/s", flush=True)
    for n in options.sequences:
        seconds = bench.decode(n, _POSITION, 32)
        title = f"decoding {n} sequences"
        report(title, device, calls.of_step(n, n), limit, seconds)
    if options.prompt:
        seconds = statistics.median(bench.step(1, prompt, 0) for _ in range(5))
        report(f"a prompt of {prompt} tokens", device, calls.of_step(prompt, 1), limit, seconds)
    bench.worker.close()


if __name__ == "__main__":
    main()
