"""Where callers and the engine meet: requests wait here for their turn, and increments for whoever polls."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from redshard.cluster.engine.answer import Answer
from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.errors import ParameterError, PipelineError

logger = logging.getLogger(__name__)

#: Requests that may wait or run, of all clients together, and tokens of their prompts.
MAX_REQUESTS, MAX_PROMPT_TOKENS = 1 << 16, 1 << 25
#: Bytes of logits that may lie here until they are polled; then requests for logits pause.
MAX_LOGITS_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class News:
    """What came for the engine since it looked last: new answers, and ids of requests to be dropped."""

    answers: list[Answer]
    aborted: list[str]


class Exchange:
    """Requests in, increments out. All methods may be called from any thread.

    Several clients may use it; each polls what belongs to its own requests.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._refuses = "the model is not loaded yet"  # why nothing is served; "" while something is
        self._prepare: Callable[[Request], Answer] | None = None
        self._unfinished: dict[str, Answer] = {}
        self._prompt_tokens = 0  # of the unfinished
        self._new: list[Answer] = []
        self._aborted: list[str] = []
        self._ready: defaultdict[str, list[Increment]] = defaultdict(list)  # by client
        self._logits_bytes = 0  # of those ready
        self._has_news = self._stops = False

    # For clients

    def add(self, requests: list[Request]) -> None:
        """Queue requests; one that cannot be run, or for which there is no room, ends with an error.

        Raises:
            PipelineError: nothing is served, not yet or not any more.
            ParameterError: a request of that id is there already.
        """
        prepared = [self._prepared(request) for request in requests]  # without the lock: it may take a while
        with self._changed:
            if self._refuses:
                raise PipelineError(self._refuses)
            for request_id, n in Counter(request.request_id for request in requests).items():
                if n > 1 or request_id in self._unfinished:
                    raise ParameterError(f"request {request_id!r} is already there")
            for request, answer in zip(requests, prepared, strict=True):
                error = answer if isinstance(answer, str) else self._lack_of_room(request)
                if isinstance(answer, str) or error:
                    self._ready[request.client].append(Increment(request.request_id, error=error))
                    continue
                self._unfinished[request.request_id] = answer
                self._prompt_tokens += len(request.tokens)
                self._new.append(answer)
            self._wake()

    def abort(self, request_ids: list[str]) -> None:
        """Drop requests; nothing more is reported of them. Unknown and finished ones are passed over."""
        with self._changed:
            for request_id in request_ids:
                self._forget(request_id)
            self._aborted += request_ids
            self._wake()

    def poll(self, timeout: float, client: str = "") -> list[Increment]:
        """What came for a client since its last poll, in order; waits up to `timeout` seconds for the first.

        Raises:
            PipelineError: everything was given and nothing will follow.
        """
        with self._changed:
            self._changed.wait_for(lambda: client in self._ready or self._refuses, timeout)
            ready = self._ready.pop(client, [])
            if self._refuses and not ready:
                raise PipelineError(self._refuses)
            if taken := _logits_bytes(ready):
                self._logits_bytes -= taken
                self._wake()
            return ready

    # For the engine

    def open(self, prepare: Callable[[Request], Answer]) -> None:
        """Take requests from now on; `prepare` makes answers of them, in the threads of who adds them."""
        self._prepare = prepare
        with self._changed:
            self._refuses = ""

    def take_news(self, wait: bool) -> News | None:
        """What came since the last call; None when it is time to stop.

        Args:
            wait: until there is something: a request, an abort, or room for logits.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._has_news)
            self._has_news = False
            if self._stops:
                return None
            news = News(self._new, self._aborted)
            self._new, self._aborted = [], []
            return news

    def find(self, request_id: str) -> Answer | None:
        """The answer of a request that has not ended."""
        return self._unfinished.get(request_id)

    @property
    def is_full_of_logits(self) -> bool:
        """Whether no more logits should come before some were polled."""
        return self._logits_bytes >= MAX_LOGITS_BYTES

    def report(self, increments: list[Increment]) -> None:
        """Hand out increments. Those of requests that have ended or were aborted meanwhile are dropped."""
        if not increments:
            return
        with self._changed:
            for increment in increments:
                answer = self._unfinished.get(increment.request_id)
                if answer is not None:
                    self._ready[answer.request.client].append(increment)
                    self._logits_bytes += _logits_bytes([increment])
                    if increment.is_last:
                        self._forget(increment.request_id)
            self._changed.notify_all()

    def stop(self) -> None:
        """Tell the engine to stop."""
        with self._changed:
            self._stops = True
            self._wake()

    def end(self, reason: str) -> None:
        """Nothing is served any more: all that is unfinished ends with that error, and all that comes."""
        with self._changed:
            self._refuses = reason
        self.report([answer.fail(reason) for answer in list(self._unfinished.values())])

    def _prepared(self, request: Request) -> Answer | str:
        """A request's answer, or why there can be none."""
        if self._prepare is None:
            raise PipelineError(self._refuses)
        try:
            return self._prepare(request)
        except Exception as error:
            logger.warning("request %s cannot be run", request.request_id, exc_info=True)
            return f"the request cannot be run: {error}"

    def _lack_of_room(self, request: Request) -> str:
        if len(self._unfinished) >= MAX_REQUESTS:
            full = f"{MAX_REQUESTS:,} requests"
        elif self._prompt_tokens + len(request.tokens) > MAX_PROMPT_TOKENS:
            full = f"requests with {self._prompt_tokens:,} prompt tokens (at most {MAX_PROMPT_TOKENS:,})"
        else:
            return ""
        return f"{full} wait or run, and there is no room for another; try again when some have ended"

    def _forget(self, request_id: str) -> None:
        answer = self._unfinished.pop(request_id, None)
        if answer is not None:
            self._prompt_tokens -= len(answer.request.tokens)

    def _wake(self) -> None:
        self._has_news = True
        self._changed.notify_all()


def _logits_bytes(increments: list[Increment]) -> int:
    return sum(increment.logits.nbytes for increment in increments if increment.logits is not None)
