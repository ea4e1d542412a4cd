"""One process's line to its coordinator: requests go out, increments come back to whoever waits for them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import ray

from cluster.errors import PipelineError, RedshardError
from cluster.requests import Increment, Request

#: Called with each increment of a request, on the session's thread; must not block.
Deliver = Callable[[Increment], object]

_POLL_S = 10.0
_CLOSE_S = 60.0


class ClientSession:
    """Talks to a coordinator actor. Its methods may be called from any thread.

    Args:
        coordinator: handle of the actor, which is serving.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._receivers: dict[str, Deliver] = {}
        self._lock = threading.Lock()
        self._ended: str | None = None
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._receive, name="redshard-increments", daemon=True)
        self._thread.start()

    def new_id(self) -> str:
        """An id for a request."""
        return f"request-{next(self._numbers)}"

    def register(self, requests: Iterable[Request], deliver: Deliver) -> Any:
        """Submit requests; the reference to wait for, with `ray.get` or `await`, may raise PipelineError."""
        requests = list(requests)
        with self._lock:
            if self._ended is not None:
                raise PipelineError(self._ended)
            for request in requests:
                self._receivers[request.request_id] = deliver
        return self._coordinator.add.remote(requests)

    def forget(self, requests: Iterable[Request]) -> None:
        """Abort those requests that have not ended."""
        with self._lock:
            open_ids = [r.request_id for r in requests if self._receivers.pop(r.request_id, None) is not None]
        if open_ids and self._ended is None:
            self._coordinator.abort.remote(open_ids)

    def close(self) -> None:
        """End the coordinator, its workers and this session. Idempotent."""
        if ray.is_initialized():
            end_coordinator(self._coordinator)
        self._thread.join()

    def _receive(self) -> None:
        try:
            while True:
                for increment in ray.get(self._coordinator.poll.remote(_POLL_S)):
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
            self._ended = reason
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
    """`ray.get` that raises the error the actor raised, not Ray's wrapping of it."""
    try:
        return ray.get(reference)
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
