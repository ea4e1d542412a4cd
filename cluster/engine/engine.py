"""The run loop: requests in, steps through the pipeline, text out; and what happens when a worker dies.

Knows no Ray: stages are behind `Stages`, so everything here is proven against stages in the same process.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

from redshard.cluster.engine.answer import Answer
from redshard.cluster.engine.exchange import Exchange, News
from redshard.cluster.engine.requests import Increment
from redshard.cluster.engine.scheduler import MAX_DEATHS, LogitsOutput, Scheduler, TokenOutput
from redshard.loader.tokenizer.tokenizer import Tokenizer
from redshard.worker.model.step_batch import StepBatch, StepResult

logger = logging.getLogger(__name__)


class StepLost(Exception):
    """A step got lost because a stage died, hung or raised; the message says which way.

    Attributes:
        timed_out: no stage is known to be dead, one of them hangs.
    """

    def __init__(self, message: str, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class StepRefused(Exception):
    """The oldest step is not one that the stages can run; they are well, and so are the other steps."""


class Steps(Protocol):
    """The way of steps through all stages."""

    def submit(self, batch: StepBatch) -> None:
        """Send a step on its way. Raises StepLost."""

    def collect(self) -> StepResult:
        """Wait for the oldest step. Raises StepLost and StepRefused."""


class Stages(Protocol):
    """All stages of the model, as the engine sees them."""

    @property
    def steps(self) -> Steps:
        """The way through the stages as they are now; another one after `restore`."""

    def restore(self, loss: StepLost) -> None:
        """Bring all stages back with empty caches. Raises PipelineError when that cannot be done."""


@dataclass(slots=True)
class EngineTimes:
    """Seconds spent since the start, and what for; the steps' own time on the workers is part of `wait_s`."""

    steps: int = 0
    tokens: int = 0
    generated: int = 0
    schedule_s: float = 0.0
    submit_s: float = 0.0
    wait_s: float = 0.0
    complete_s: float = 0.0
    deliver_s: float = 0.0
    restarts: int = 0


class Engine:
    """Runs the requests of an exchange to their end on stages, on a thread of its own.

    Args:
        scheduler: with nothing in it.
        stages: loaded.
        tokenizer: the model's.
        exchange: not open yet.

    Attributes:
        state: "serving", "recovering", "failed" or "closed".
        times: where time went.
    """

    def __init__(
        self, scheduler: Scheduler, stages: Stages, tokenizer: Tokenizer, exchange: Exchange
    ) -> None:
        self.times = EngineTimes()
        self.state = "serving"
        self._scheduler = scheduler
        self._stages = stages
        self._exchange = exchange
        self._held: StepBatch | None = None  # made ahead, and waiting for tokens that it feeds
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        exchange.open(lambda request: Answer(request, tokenizer))
        self._thread.start()

    def close(self) -> None:
        """Stop after the step under way; unfinished requests end with an error. Idempotent."""
        self._exchange.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The engine's thread

    def _run(self) -> None:
        try:
            outputs: list[TokenOutput | LogitsOutput] = []
            is_idle = True
            while (news := self._exchange.take_news(wait=is_idle)) is not None:
                self._take(news)
                is_idle = False
                try:
                    self._submit()
                    # What could not be run now can be when something comes from outside; and what is
                    # delivered may end a request, which makes room.
                    is_idle = not (outputs or self._scheduler.in_flight)
                    # The next steps are on their way: time to tell people about the last one.
                    self._deliver(outputs)
                    outputs = []
                    outputs = self._collect()
                except StepLost as loss:
                    self._recover(loss)
            self._end("closed", "the model was closed")
        except Exception as error:
            logger.exception("the engine stopped")
            self._end("failed", f"the pipeline failed and cannot go on: {error}")

    def _take(self, news: News) -> None:
        """Let the scheduler know what came; a request that it does not take fails alone."""
        self._scheduler.pauses_logits = self._exchange.is_full_of_logits
        for answer in news.answers:
            try:
                self._scheduler.add(answer.sequence)
            except Exception as error:
                logger.warning("request %s cannot be run", answer.request.request_id, exc_info=True)
                self._exchange.report([answer.fail(f"the request cannot be run: {error}")])
        for request_id in news.aborted:
            self._scheduler.abort(request_id)

    def _submit(self) -> None:
        """Send as many steps on their way as may be, and keep one that waits for tokens it feeds."""
        times = self.times
        while True:
            began = time.perf_counter()
            batch = self._held or self._scheduler.schedule()
            scheduled = time.perf_counter()
            times.schedule_s += scheduled - began
            self._held = None
            if batch is None:
                return
            if not self._scheduler.bind(batch):
                self._held = batch
                return
            self._stages.steps.submit(batch)
            times.submit_s += time.perf_counter() - scheduled
            times.steps += 1
            times.tokens += len(batch.token_ids)

    def _collect(self) -> list[TokenOutput | LogitsOutput]:
        """Wait for the oldest step, if there is one, and complete it."""
        if not self._scheduler.in_flight:
            return []
        began = time.perf_counter()
        try:
            result = self._stages.steps.collect()
        except StepRefused as refused:
            for sequence in self._scheduler.refuse():
                self._fail(sequence.request_id, f"a step of the request cannot be run: {refused}")
            return []
        arrived = time.perf_counter()
        outputs = self._scheduler.complete(result)
        self.times.wait_s += arrived - began
        self.times.complete_s += time.perf_counter() - arrived
        return outputs

    def _recover(self, loss: StepLost) -> None:
        """Bring the stages back and start the running sequences over from their tokens."""
        logger.warning("recovering: %s", loss)
        self.state = "recovering"
        self._held = None
        self.times.restarts += 1
        for sequence in self._scheduler.recompute_all():
            self._fail(
                sequence.request_id,
                f"the workers failed {MAX_DEATHS} times in a row over this request, the last time over it "
                f"alone ({loss}); it was given up so that others can go on",
            )
        self._stages.restore(loss)
        self.state = "serving"

    # Answers

    def _deliver(self, outputs: list[TokenOutput | LogitsOutput]) -> None:
        """Turn tokens into text and report what is due."""
        began = time.perf_counter()
        ready = []
        for output in outputs:
            answer = self._exchange.find(output.sequence.request_id)
            if answer is not None and (increment := self._increment(answer, output)) is not None:
                ready.append(increment)
        self._exchange.report(ready)
        self.times.deliver_s += time.perf_counter() - began

    def _increment(self, answer: Answer, output: TokenOutput | LogitsOutput) -> Increment | None:
        """What is due to a request after an output; an error with it is about this request alone."""
        self.times.generated += isinstance(output, TokenOutput) and output.token >= 0
        try:
            answer.add(output)
            increment = answer.take()
        except Exception as error:
            logger.exception("request %s cannot go on", answer.request.request_id)
            increment = answer.fail(f"its output cannot be delivered: {error}")
        if increment is not None and increment.is_last:
            self._scheduler.abort(increment.request_id)  # it may not know: text ends at stop strings
        return increment

    def _fail(self, request_id: str, error: str) -> None:
        answer = self._exchange.find(request_id)
        if answer is not None:
            self._exchange.report([answer.fail(error)])

    def _end(self, state: str, error: str) -> None:
        self.state = state
        self._exchange.end(error)
