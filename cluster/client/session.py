"""One process's line to its coordinator: requests go out, increments come back to whoever waits for them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import ray

from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.errors import PipelineError, RedshardError
from redshard.cluster.pipeline.ray_errors import reason
from redshard.cluster.pipeline.ray_session import RaySession, is_current

logger = logging.getLogger(__name__)

#: Called with each increment of a request, on the session's thread; must not block.
Deliver = Callable[[Increment], object]

_POLL_S = 10.0
#: How often whoever waits looks whether this process is still in the cluster.
_LOOK_S = 2.0
_CLOSE_S = 60.0
_CLOSED = "the model was closed"
_LEFT = "this process has left the Ray cluster of the model; load the model again"


@dataclass(frozen=True, slots=True)
class _Receiver:
    """Who takes a request's increments, and the reference to its submission."""

    deliver: Deliver
    submitted: Any


class ClientSession:
    """Talks to a coordinator actor. Its methods may be called from any thread.

    Args:
        coordinator: handle of the actor, which is serving.
        ray_session: the connection to Ray that the handle belongs to.

    Attributes:
        name: of this client; like no other in the cluster.
    """

    def __init__(self, coordinator: Any, ray_session: RaySession) -> None:
        self._coordinator = coordinator
        self._ray_session = ray_session
        self._receivers: dict[str, _Receiver] = {}
        # Reentrant, because garbage collection may close the session in a thread that holds it.
        self._lock = threading.RLock()
        self._ended: str | None = None
        self.name = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._receive, name="redshard-increments", daemon=True)
        self._thread.start()

    def new_id(self) -> str:
        """An id for a request, like no other in the cluster."""
        return f"{self.name}-{next(self._numbers)}"

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the coordinator.

        Returns the reference to wait for, with `wait` or `await`. Raises PipelineError, before anything is
        sent, when the model was closed or its coordinator is gone.
        """
        with self._lock:
            self._check()
            return getattr(self._coordinator, method).remote(*arguments)

    def wait(self, reference: Any) -> Any:
        """What a call gives. Raises the error that the coordinator raised, not Ray's wrapping of it.

        `ray.get` would start another Ray if this process left the cluster meanwhile.
        """
        result = reference.future()
        while not futures.wait([result], _LOOK_S).done:
            with self._lock:
                if not is_current(self._ray_session):
                    raise PipelineError(_LEFT)
        return unwrapped(result.result)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the coordinator and wait; errors as for `call` and `wait`."""
        return self.wait(self.call(method, *arguments))

    def register(self, requests: Iterable[Request], deliver: Deliver) -> Any:
        """Submit requests; as for `call`, the reference may raise PipelineError."""
        requests = list(requests)
        with self._lock:
            submitted = self.call("add", requests)
            for request in requests:
                self._receivers[request.request_id] = _Receiver(deliver, submitted)
            return submitted

    def forget(self, requests: Iterable[Request]) -> None:
        """Abort those requests that have not ended."""
        with self._lock:
            found = {r.request_id: self._receivers.pop(r.request_id, None) for r in requests}
            self._abort({request_id: receiver for request_id, receiver in found.items() if receiver})

    def close(self) -> None:
        """End the coordinator, its workers and this session; no call goes out any more. Idempotent."""
        with self._lock:
            self._ended = _CLOSED
        if is_current(self._ray_session):
            end_coordinator(self._coordinator)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self) -> None:
        # Ray would start a new cluster of its own for a call without a connection.
        if self._ended is None and not is_current(self._ray_session):
            self._ended = _LEFT
        if self._ended is not None:
            raise PipelineError(self._ended)

    def _receive(self) -> None:
        try:
            while True:
                for increment in self.ask("poll", _POLL_S, self.name):
                    self._deliver(increment)
        except Exception as error:
            self._end(_explained(error))

    def _abort(self, receivers: dict[str, _Receiver]) -> None:
        """Abort requests. The call waits for their submissions, which it could overtake otherwise."""
        if receivers:
            submitted = {receiver.submitted for receiver in receivers.values()}
            with contextlib.suppress(PipelineError):  # then they have ended
                self.call("abort", list(receivers), *submitted)

    def _deliver(self, increment: Increment) -> None:
        with self._lock:
            receiver = self._receivers.get(increment.request_id)
            if increment.is_last:
                self._receivers.pop(increment.request_id, None)
        if receiver is None:
            return
        try:
            receiver.deliver(increment)
        except Exception as error:  # for instance an event loop that was closed: none of the others' business
            logger.warning("request %s is dropped: nobody takes its output (%s)", increment.request_id, error)
            with self._lock:
                if self._receivers.pop(increment.request_id, None):
                    self._abort({increment.request_id: receiver})

    def _end(self, reason: str) -> None:
        with self._lock:
            self._ended = self._ended or reason
            receivers = list(self._receivers)
        for request_id in receivers:
            self._deliver(Increment(request_id, error=reason))


def end_coordinator(coordinator: Any) -> None:
    """Close a coordinator and wait until its process is gone."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(coordinator.close.remote(), timeout=_CLOSE_S)
    ray.kill(coordinator)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(coordinator.state.remote(), timeout=_CLOSE_S)


def unwrapped(get: Callable[[], Any]) -> Any:
    """What `get` gives; raises the error that an actor raised, not Ray's wrapping of it."""
    try:
        return get()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RedshardError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise PipelineError(_explained(error)) from error


def _explained(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RedshardError):
        return str(cause)
    return f"the coordinator is gone ({reason(error)}); load the model again"
