"""One process's line to its coordinator: requests go out, increments come back to whoever waits for them."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import ray

from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.errors import PipelineError, RedshardError
from redshard.cluster.pipeline.ray_session import RaySession, is_current

#: Called with each increment of a request, on the session's thread; must not block.
Deliver = Callable[[Increment], object]

#: Without its wrappers, one of which starts a new Ray when this process has left the one it was in.
_get: Any = inspect.unwrap(ray.get)

_POLL_S = 10.0
_CLOSE_S = 60.0
_CLOSED = "the model was closed"


class ClientSession:
    """Talks to a coordinator actor. Its methods may be called from any thread.

    Args:
        coordinator: handle of the actor, which is serving.
        ray_session: the connection to Ray that the handle belongs to.
    """

    def __init__(self, coordinator: Any, ray_session: RaySession) -> None:
        self._coordinator = coordinator
        self._ray_session = ray_session
        self._receivers: dict[str, Deliver] = {}
        # Reentrant, because garbage collection may close the session in a thread that holds it.
        self._lock = threading.RLock()
        self._ended: str | None = None
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._receive, name="redshard-increments", daemon=True)
        self._thread.start()

    def new_id(self) -> str:
        """An id for a request."""
        return f"request-{next(self._numbers)}"

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the coordinator.

        Returns the reference to wait for, with `ask` or `await`. Raises PipelineError, before anything is
        sent, when the model was closed or its coordinator is gone.
        """
        with self._lock:
            self._check()
            return getattr(self._coordinator, method).remote(*arguments)

    def register(self, requests: Iterable[Request], deliver: Deliver) -> Any:
        """Submit requests; as for `call`, the reference may raise PipelineError."""
        requests = list(requests)
        with self._lock:
            self._check()
            for request in requests:
                self._receivers[request.request_id] = deliver
            return self.call("add", requests)

    def forget(self, requests: Iterable[Request]) -> None:
        """Abort those requests that have not ended."""
        with self._lock:
            open_ids = [r.request_id for r in requests if self._receivers.pop(r.request_id, None) is not None]
            if open_ids:
                with contextlib.suppress(PipelineError):  # then they have ended
                    self.call("abort", open_ids)

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
            self._ended = "this process has left the Ray cluster of the model; load the model again"
        if self._ended is not None:
            raise PipelineError(self._ended)

    def _receive(self) -> None:
        try:
            while True:
                for increment in _get(self.call("poll", _POLL_S)):
                    self._deliver(increment)
        except Exception as error:
            self._end(_reason(error))

    def _deliver(self, increment: Increment) -> None:
        with self._lock:
            deliver = self._receivers.get(increment.request_id)
            if increment.is_last:
                self._receivers.pop(increment.request_id, None)
        if deliver is not None:
            deliver(increment)

    def _end(self, reason: str) -> None:
        with self._lock:
            self._ended = self._ended or reason
            receivers, self._receivers = self._receivers, {}
        for request_id, deliver in receivers.items():
            deliver(Increment(request_id, error=reason))


def end_coordinator(coordinator: Any) -> None:
    """Close a coordinator and wait until its process is gone."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(coordinator.close.remote(), timeout=_CLOSE_S)
    ray.kill(coordinator)
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(coordinator.state.remote(), timeout=_CLOSE_S)


def ask(reference: Any) -> Any:
    """`_get` that raises the error the actor raised, not Ray's wrapping of it."""
    try:
        return _get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RedshardError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise PipelineError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RedshardError):
        return str(cause)
    first_line = str(cause).partition("\n")[0]
    return f"the coordinator is gone ({type(cause).__name__}: {first_line}); load the model again"
