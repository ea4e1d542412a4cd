"""What handing a step through the stages costs: plain actor calls against Ray's compiled graphs.

    python tests/benchmarks/bench_pipeline.py [--steps 300] [--repeats 5]

The stages do nothing but unpack and pack their messages, so a step's time is what the pipeline adds to the
work of the devices. Messages are those of the pipeline; in flight are as many steps as there are stages.
Both ways take turns in every setting, and the best of the repeats counts, so that other load disturbs least.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

# Run as a script, this file sees neither the project nor the tests' helpers.
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import ray  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from redshard.cluster.pipeline.stage_graph import StageGraph  # noqa: E402
from redshard.cluster.pipeline.wire import (  # noqa: E402
    decode_batch,
    decode_hidden,
    decode_result,
    encode_batch,
    encode_hidden,
    encode_result,
)
from redshard.worker.model.step_batch import SAMPLING_ROW_DTYPE, TABLE_ENTRY_DTYPE, StepBatch, StepResult  # noqa: E402

WIDTH = 896
#: (stages, tokens of a step)
SETTINGS = [(1, 1), (1, 16), (2, 1), (2, 16), (2, 256), (3, 16), (4, 16)]


class EmptyStage:
    """Unpacks a step and packs hidden states or a result."""

    def __init__(self, is_last: bool) -> None:
        self._is_last = is_last

    def step(self, message: bytes, hidden: bytes = b"") -> bytes:
        """As `StageActor.step`."""
        if not message:
            return message
        batch = decode_batch(message)
        if hidden:
            decode_hidden(hidden)
        n = len(batch.token_ids)
        if not self._is_last:
            return encode_hidden(np.zeros((n, WIDTH), np.float32))
        none = np.empty((n, 0), np.int32)
        return encode_result(
            StepResult(batch.step_id, batch.token_ids, np.zeros(n, np.float32), none, none.view(np.float32))
        )


class ActorCalls:
    """The way not taken: each stage is called with a reference to what the one before gives."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._in_flight: deque[Any] = deque()

    def submit(self, batch: StepBatch) -> None:
        """Send a step to the first stage."""
        message, hidden = encode_batch(batch), b""
        for actor in self._actors:
            hidden = actor.step.remote(message, hidden)
        self._in_flight.append(hidden)

    def collect(self) -> StepResult:
        """Wait for the oldest step."""
        return decode_result(ray.get(self._in_flight.popleft()))

    def close(self) -> None:
        """Nothing to let go of."""


class Driver:
    """Runs in an actor, as the coordinator does."""

    def measure(self, n_stages: int, n_tokens: int, n_steps: int, repeats: int) -> dict[str, float]:
        """Seconds a step, by way: the best of the repeats."""
        best = {"calls": float("inf"), "graph": float("inf")}
        for _ in range(repeats):
            for way in best:
                best[way] = min(best[way], self._time(way, n_stages, n_tokens, n_steps))
        return best

    def _time(self, way: str, n_stages: int, n_tokens: int, n_steps: int) -> float:
        stage: Any = ray.remote(EmptyStage)
        actors = [stage.options(num_cpus=0).remote(i == n_stages - 1) for i in range(n_stages)]
        pipeline: Any = ActorCalls(actors) if way == "calls" else StageGraph(actors, n_stages, deadline_s=60)
        _run(pipeline, n_stages, n_tokens, 20)
        began = time.perf_counter()
        _run(pipeline, n_stages, n_tokens, n_steps)
        seconds = (time.perf_counter() - began) / n_steps
        pipeline.close()
        for actor in actors:
            ray.kill(actor)
        return seconds


def _run(pipeline: Any, n_in_flight: int, n_tokens: int, n_steps: int) -> None:
    for step in range(n_steps):
        pipeline.submit(_batch(step, n_tokens))
        if step >= n_in_flight - 1:
            pipeline.collect()
    for _ in range(n_in_flight - 1):
        pipeline.collect()


def _batch(step: int, n: int) -> StepBatch:
    return StepBatch(
        step,
        token_ids=np.zeros(n, np.int32),
        positions=np.zeros(n, np.int32),
        query_starts=np.arange(n + 1, dtype=np.int32),
        slots=np.arange(n, dtype=np.int32),
        table_entries=np.empty(0, TABLE_ENTRY_DTYPE),
        output_rows=np.arange(n, dtype=np.int32),
        sampling=np.zeros(n, SAMPLING_ROW_DTYPE),
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    remote: Any = ray.remote(Driver)
    driver = remote.options(num_cpus=0).remote()
    table = Table("stages", "tokens", "actor calls, µs a step", "compiled graph, µs a step", "ratio")
    for n_stages, n_tokens in SETTINGS:
        best = ray.get(driver.measure.remote(n_stages, n_tokens, arguments.steps, arguments.repeats))
        calls, graph = best["calls"] * 1e6, best["graph"] * 1e6
        table.add_row(str(n_stages), str(n_tokens), f"{calls:.0f}", f"{graph:.0f}", f"{calls / graph:.2f}")
    Console().print(table)
    ray.shutdown()


if __name__ == "__main__":
    main()
