"""The run loop: requests in, steps through the pipeline, text out; and what happens when a worker dies.

Knows no Ray: stages are behind `Stages`, so everything here is proven against stages in the same process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from redshard.cluster.engine.requests import Increment, Request, TokenLogprob
from redshard.cluster.engine.scheduler import MAX_DEATHS, LogitsOutput, Scheduler, TokenOutput
from redshard.cluster.engine.sequence import Sequence
from redshard.cluster.engine.text import TextStream
from redshard.cluster.errors import PipelineError
from redshard.loader.tokenizer.tokenizer import Tokenizer
from redshard.worker.model.step_batch import StepBatch, StepResult

logger = logging.getLogger(__name__)

#: Requests that may wait for their turn.
MAX_WAITING = 1 << 16
#: Bytes of logits that may lie here until they are polled; then requests for logits pause.
_MAX_LOGITS_BYTES = 256 << 20


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


@dataclass(slots=True)
class _Answer:
    """A request that runs, and what it is given until that is delivered."""

    request: Request
    sequence: Sequence
    text: TextStream
    arrived: float
    pending: Increment
    has_token: bool = False


class Engine:
    """Runs requests to their end on stages.

    One thread of its own does all the work; the public methods may be called from any thread.

    Args:
        scheduler: with nothing in it.
        stages: loaded.
        tokenizer: the model's.
    """

    def __init__(self, scheduler: Scheduler, stages: Stages, tokenizer: Tokenizer) -> None:
        self.times = EngineTimes()
        self.state = "serving"
        self._scheduler = scheduler
        self._stages = stages
        self._tokenizer = tokenizer
        self._answers: dict[str, _Answer] = {}
        self._changed = threading.Condition()
        self._new: deque[_Answer] = deque()
        self._unpolled_logits = 0  # bytes
        self._aborted: deque[str] = deque()
        self._ready: list[Increment] = []
        self._held: StepBatch | None = None  # made ahead, and waiting for tokens that it feeds
        self._closing = False
        self._ended = ""  # why nothing is served any more
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # For any thread

    def add(self, requests: list[Request]) -> None:
        """Queue requests; one that cannot be run, or for which there is no room, ends with an error.

        Raises:
            PipelineError: nothing can be served any more.
        """
        prepared = [self._prepared(request) for request in requests]  # here, because it may take a while
        with self._changed:
            if self._ended:
                raise PipelineError(self._ended)
            for answer in prepared:
                if isinstance(answer, Increment):
                    self._ready.append(answer)
                elif len(self._new) + len(self._answers) >= MAX_WAITING:
                    answer.pending.error = (
                        f"{MAX_WAITING} requests are under way or waiting, and no more are taken; try again "
                        "when some have ended"
                    )
                    self._ready.append(answer.pending)
                else:
                    self._new.append(answer)
            self._changed.notify_all()

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests; nothing more is reported of them. Unknown and finished ones are passed over."""
        with self._changed:
            self._aborted.extend(request_ids)
            self._changed.notify_all()

    def poll(self, timeout: float) -> list[Increment]:
        """What was delivered since the last poll, in order; waits up to `timeout` seconds for the first.

        Raises:
            PipelineError: everything was delivered and nothing will ever follow.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, timeout)
            if self._ended and not self._ready:
                raise PipelineError(self._ended)
            ready, self._ready = self._ready, []
            self._unpolled_logits = 0
            self._changed.notify_all()
            return ready

    def close(self) -> None:
        """Stop after the step under way; unfinished requests end with an error. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The engine's thread

    def _run(self) -> None:
        try:
            outputs: list[TokenOutput | LogitsOutput] = []
            while self._take_requests(wait=not (outputs or self._scheduler.in_flight)):
                try:
                    self._submit()
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

    def _take_requests(self, wait: bool) -> bool:
        """Hand new requests to the scheduler; False when it is time to stop."""
        with self._changed:
            if wait:
                self._changed.wait_for(
                    lambda: self._new or self._aborted or self._closing or self._has_work()
                )
            if self._closing:
                return False
            new, self._new = self._new, deque()
            aborted, self._aborted = self._aborted, deque()
            self._scheduler.pauses_logits = self._unpolled_logits >= _MAX_LOGITS_BYTES
            for answer in new:
                self._answers[answer.request.request_id] = answer
        for answer in new:
            self._admit(answer)
        for request_id in aborted:
            self._scheduler.abort(request_id)
            self._answers.pop(request_id, None)
        return True

    def _has_work(self) -> bool:
        """Whether a step could be made of what the scheduler has."""
        return self._scheduler.n_unfinished > 0 and self._unpolled_logits < _MAX_LOGITS_BYTES

    def _admit(self, answer: _Answer) -> None:
        """Queue a request; one that cannot be a sequence fails alone, whatever is wrong with it."""
        try:
            self._scheduler.add(answer.sequence)
        except Exception as error:
            logger.warning("request %s cannot be run", answer.request.request_id, exc_info=True)
            self._fail(answer.request.request_id, f"the request cannot be run: {error}")

    def _prepared(self, request: Request) -> _Answer | Increment:
        """What a request becomes, or its last increment if nothing can become of it."""
        pending = Increment(request.request_id)
        try:
            text = TextStream(self._tokenizer, request.params.stop)
            return _Answer(request, self._sequence(request), text, time.monotonic(), pending)
        except Exception as error:
            logger.warning("request %s cannot be run", request.request_id, exc_info=True)
            pending.error = f"the request cannot be run: {error}"
            return pending

    def _sequence(self, request: Request) -> Sequence:
        params = request.params
        return Sequence(
            request.request_id,
            request.tokens,
            params,
            max_length=len(request.tokens) + params.max_tokens,
            seed=request.seed,
            stop_tokens=params.stop_token_ids
            | (frozenset() if params.ignore_eos else self._tokenizer.eog_ids),
            wants_logits=request.wants_logits,
        )

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
            answer = self._answers.get(output.sequence.request_id)
            if answer is None:
                continue
            try:
                self._add(answer, output)
            except Exception as error:  # whatever it is, it is about this request alone
                logger.exception("request %s cannot go on", answer.request.request_id)
                self._scheduler.abort(answer.request.request_id)
                answer.pending.error = f"its output cannot be delivered: {error}"
            pending = answer.pending
            if pending.is_last:
                pending.total_s = time.monotonic() - answer.arrived
                del self._answers[pending.request_id]
            is_due = pending.logits is not None or (answer.request.stream and pending.token_ids)
            if pending.is_last or is_due:
                ready.append(pending)
                answer.pending = Increment(pending.request_id)
        self._report(ready)
        self.times.deliver_s += time.perf_counter() - began

    def _add(self, answer: _Answer, output: TokenOutput | LogitsOutput) -> None:
        """Add what a step gave a request to what it will be told."""
        if isinstance(output, LogitsOutput):
            answer.pending.logits, answer.pending.logits_start = output.logits, output.start
            answer.pending.finish_reason = "stop" if output.finished else None
        elif output.token < 0:
            answer.pending.error = (
                "the logits are not finite: the model's weights are broken, or overflow on this prompt"
            )
        else:
            self._add_token(answer, output)

    def _add_token(self, answer: _Answer, output: TokenOutput) -> None:
        pending, params = answer.pending, answer.request.params
        self.times.generated += 1
        if not answer.has_token:
            answer.has_token = True
            pending.first_token_s = time.monotonic() - answer.arrived
        pending.token_ids.append(output.token)
        if params.logprobs is not None:
            pending.logprobs.append(TokenLogprob(output.token, output.logprob, tuple(output.top)))
        if output.finish_reason != "stop":  # a token that ends the completion is not part of its text
            pending.text += answer.text.push(output.token)
        if answer.text.stopped:
            self._scheduler.abort(pending.request_id)
            pending.finish_reason = "stop"
        elif output.finish_reason is not None:
            pending.text += answer.text.flush()
            pending.finish_reason = "stop" if answer.text.stopped else output.finish_reason

    def _fail(self, request_id: str, error: str) -> None:
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            answer.pending.error = error
            self._report([answer.pending])

    def _report(self, increments: list[Increment]) -> None:
        if increments:
            with self._changed:
                self._ready += increments
                self._unpolled_logits += sum(i.logits.nbytes for i in increments if i.logits is not None)
                self._changed.notify_all()

    def _end(self, state: str, error: str) -> None:
        """Stop serving, with an error for every request there is."""
        with self._changed:
            self.state = state
            self._ended = error
            unfinished = [*self._answers, *(answer.request.request_id for answer in self._new)]
            self._answers.clear()
            self._new.clear()
            self._ready += [Increment(request_id, error=error) for request_id in unfinished]
            self._changed.notify_all()
