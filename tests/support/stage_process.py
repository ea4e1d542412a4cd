"""A stage in a process of its own, without Ray: its methods are called over a pipe."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from redshard.cluster.pipeline.stage_actor import StageActor

#: Seconds that a call may take.
CALL_S = 60.0
_EXIT_S = 10.0


class StageProcess:
    """Calls the methods of a `StageActor` in another process; what it raises there is raised here.

    Args:
        make: makes the actor, in its process; must be picklable. An error of it is raised by the first call.
        environment: variables of the process, set before it opens a device.
    """

    def __init__(self, make: Callable[[], StageActor], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.calls, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, dict(environment)), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any, **named: Any) -> None:
        """Begin a call; `answer` gives its result."""
        self.calls.send((method, arguments, named))

    def answer(self, timeout: float = CALL_S) -> Any:
        """The result of the oldest call. Raises TimeoutError, and EOFError when the process has died."""
        if not self.calls.poll(timeout):
            raise TimeoutError(f"process {self.process.pid} has not answered within {timeout:g} s")
        try:
            result, error = self.calls.recv()
        except (EOFError, ConnectionError):
            self.process.join(1)
            raise EOFError(f"process {self.process.pid} has ended, status {self.process.exitcode}") from None
        if error is not None:
            raise error
        return result

    def call(self, method: str, *arguments: Any, timeout: float = CALL_S, **named: Any) -> Any:
        """Call a method and wait."""
        self.ask(method, *arguments, **named)
        return self.answer(timeout)

    def load(self, *arguments: Any, **named: Any) -> Any:
        """As `StageActor.load`."""
        return self.call("load", *arguments, **named)

    def run(self, *arguments: Any) -> Any:
        """As `StageActor.run`."""
        return self.call("run", *arguments)

    def close(self) -> None:
        """End the process, whatever it is doing. Idempotent."""
        self.process.kill()
        self.process.join(_EXIT_S)
        self.calls.close()


def connect(sender: StageProcess, receiver: StageProcess, n_slots: int, timeout: float = CALL_S) -> bool:
    """Let a stage hand over through device memory, as a pipeline does; False where that does not work."""
    offer = receiver.call("open_inbox", n_slots, timeout=timeout)
    probe = sender.call("connect", offer, timeout=timeout)
    works = receiver.call("finds", probe, timeout=timeout)
    if not works:
        sender.call("disconnect", timeout=timeout)
    return works


def _serve(calls: Connection, make: Callable[[], StageActor], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    actor: StageActor | None = None
    while True:
        try:
            method, arguments, named = calls.recv()
        except EOFError:
            return
        result: Any = None
        error: Exception | None = None
        try:
            actor = actor or make()
            result = getattr(actor, method)(*arguments, **named)
        except Exception as failure:
            error = failure
        calls.send((result, error))
