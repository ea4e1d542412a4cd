"""Steps through the stages: a Ray compiled graph, in which each stage takes its message from the one before.

Plain actor calls were measured too and take longer (tests/benchmarks/bench_pipeline.py; figures in
ARCHITECTURE.md).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import ray
from ray.dag import InputNode

from redshard.cluster.engine.engine import StepLost, StepRefused
from redshard.cluster.pipeline.ray_errors import reason
from redshard.cluster.pipeline.wire import decode_result, encode_batch
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_deadline import StepDeadline
from redshard.worker.model.step_inputs import BatchError

_CONNECT_S = 60.0
_GRACE, _GRACE_S = 1.1, 2.0


class StageGraph:
    """Stages in a row, as a compiled graph.

    Every stage takes a step's batch from here, and hidden states from the stage before.

    Args:
        actors: handles of `StageActor`, in order. Each can be part of one graph at a time.
        max_in_flight: steps that may be under way at once.
        deadline_s: seconds that a worker may take for a step, at most.
    """

    def __init__(self, actors: list[Any], max_in_flight: int, deadline_s: float) -> None:
        # A worker's watchdog ends its process at the deadline of a step; should that fail, this is later.
        self._deadline = StepDeadline(_GRACE * deadline_s + _GRACE_S, times=2)
        self._in_flight: deque[Any] = deque()
        self._rows: deque[int] = deque()  # of the steps under way
        with InputNode() as message:
            node: Any = actors[0].step.bind(message)
            for actor in actors[1:]:
                node = actor.step.bind(message, node)
        self._graph = node.experimental_compile(_max_inflight_executions=max_in_flight + 1)
        # The first message takes half a second; better now than when somebody waits for a token.
        self._graph.execute(b"").get(timeout=_CONNECT_S)

    def submit(self, batch: StepBatch) -> None:
        """Send a step to the stages. Raises StepLost when they do not take it."""
        self._send(encode_batch(batch))
        self._rows.append(len(batch.token_ids))

    def collect(self) -> StepResult:
        """Wait for the oldest step.

        A stage that runs one step behind (see `StageActor.step`) answers a step's message with the result of
        the step before; if nothing follows, an empty message asks for it.

        Raises:
            StepLost: a stage died, raised, or did not answer in time.
            StepRefused: the step is not one that a stage can run.
        """
        rows, began = self._rows.popleft(), time.monotonic()
        while True:
            if not self._in_flight:
                self._send(b"")
            with _steps_get_lost():
                message = self._in_flight.popleft().get(timeout=self._deadline.of(rows))
            if message:
                self._deadline.note(rows, time.monotonic() - began)
                return decode_result(message)

    def close(self) -> None:
        """Let go of the stages; those that live can be part of another graph. Idempotent."""
        self._in_flight.clear()
        self._rows.clear()
        with contextlib.suppress(ray.exceptions.RayError):
            self._graph.teardown()

    def _send(self, message: bytes) -> None:
        with _steps_get_lost():
            self._in_flight.append(self._graph.execute(message))


@contextlib.contextmanager
def _steps_get_lost() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BatchError):
            raise StepRefused(str(error.cause)) from error
        raise StepLost(f"a stage raised {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayChannelTimeoutError as error:
        raise StepLost("a stage did not answer in time", timed_out=True) from error
    except ray.exceptions.RayError as error:
        raise StepLost(reason(error)) from error
