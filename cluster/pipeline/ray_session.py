"""Joining a Ray cluster, or starting a local one, and leaving it with its last user in this process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from redshard.cluster.errors import PipelineError
from redshard.worker.device.choose import visible_devices_conflict

#: Tells one connection of this process to Ray from another: (address of the cluster, job).
RaySession = tuple[str, str]

# Reentrant, because a model that is collected as garbage disconnects in whatever thread that happens.
_lock = threading.RLock()
_users: Counter[RaySession] = Counter()
_started_here: set[RaySession] = set()


def connect() -> RaySession:
    """Make Ray usable in this process until `disconnect` was called as often as this.

    Joins the cluster that RAY_ADDRESS names or that `ray start` left running on this machine; otherwise
    starts a local one, without dashboard, usage statistics or log lines. A connection that is there already
    is used, and stays.

    Raises:
        PipelineError: the cluster cannot be reached, or the environment contradicts itself.
    """
    with _lock:
        session = _current()
        if session is None:
            session = _start()
            _started_here.add(session)
        _users[session] += 1
        return session


def disconnect(session: RaySession) -> None:
    """The end of a `connect`: the last one leaves the cluster, or ends it if it was started here."""
    with _lock:
        _users[session] -= 1
        if _users[session] > 0:
            return
        del _users[session]
        if session in _started_here:
            _started_here.remove(session)
            if is_current(session):
                with _interrupts_deferred():
                    ray.shutdown()


def is_current(session: RaySession) -> bool:
    """Whether this process still has that connection; after a `ray.shutdown()` by others it has not."""
    return _current() == session


def _current() -> RaySession | None:
    if not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_job_id()


def _start() -> RaySession:
    if conflict := visible_devices_conflict(os.environ):
        raise PipelineError(conflict)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's default of 15 would let any other program of the machine push the workers aside.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # These speak before ray.init has set the level of its loggers.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with _interrupts_deferred():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        session = _current()
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:  # Ray raises plain ones too, for instance when a busy machine starts it slowly
        ray.shutdown()
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            raise PipelineError(f"Ray cannot be started on this machine, or joined there: {error}") from error
        hint = "is it running, and does it want a token (RAY_AUTH_MODE=token)?"
        raise PipelineError(f"the Ray cluster {address} cannot be joined: {error}; {hint}") from error
    assert session is not None
    return session


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect only after the block: half started or half ended, Ray leaves processes behind."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is None:
        yield  # only the main thread is interrupted, and a handler not from Python could not be put back
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
