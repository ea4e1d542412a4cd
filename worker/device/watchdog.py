"""Ends the process when a call hangs: a driver call that does not return cannot be cancelled.

One daemon thread watches every guard of the process. Device runtimes release the interpreter lock while they
wait, so the thread runs even when the call it watches never returns.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType

from redshard.worker.device.base import Device

#: Exit status of a process that the watchdog ended.
EXIT_HUNG = 87

_POLL_S = 0.1
_REPORT_S = 2.0

logger = logging.getLogger(__name__)


def hang_hint(kind: str, arch: str) -> str:
    """What to try when a call on this sort of device hangs.

    Sources: https://github.com/ROCm/ROCm/issues/5590 and https://github.com/ROCm/ROCm/issues/5724.
    """
    if kind == "hip" and arch.startswith("gfx11"):
        return (
            "RDNA3 cards hang with some versions of their MES firmware: look for MES messages in dmesg, "
            "boot with amdgpu.cwsr_enable=0, and move away from MES firmware 0x83 (see amdgpu_firmware_info)"
        )
    if kind == "hip":
        return "look for amdgpu timeouts and resets in dmesg"
    if kind == "cuda":
        return "look for Xid messages in dmesg"
    return "look for swapping (the machine may be out of memory) and for stopped storage"


class Guard:
    """A block that must end in time; use as a context manager. Not reusable while it is entered."""

    __slots__ = ("deadline_s", "expires", "hint", "what", "where")

    def __init__(self, what: str, deadline_s: float, where: str, hint: str) -> None:
        self.what = what
        self.deadline_s = deadline_s
        self.where = where
        self.hint = hint
        self.expires = 0.0

    def __enter__(self) -> None:
        self.expires = time.monotonic() + self.deadline_s
        _watcher.guards[id(self)] = self
        _watcher.ensure_running()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _watcher.guards.pop(id(self), None)


class Watchdog:
    """Makes guards that tell which device was being worked on."""

    def __init__(self, device: Device) -> None:
        properties = device.properties
        self._where = f"{device.kind} device {properties.name} ({properties.arch})"
        self._hint = hang_hint(device.kind, properties.arch)

    def guard(self, what: str, deadline_s: float) -> Guard:
        """A context manager: if its block runs longer than `deadline_s` seconds, the process logs and ends.

        Args:
            what: what the block does, with the sizes, for the log; e.g. "allocating weights 3 of 7 (1.0
                GiB)".
            deadline_s: time allowed, in seconds. Time in which the whole process was stopped does not count.
        """
        return Guard(what, deadline_s, self._where, self._hint)


class _Watcher:
    """The thread behind all guards."""

    def __init__(self) -> None:
        self.guards: dict[int, Guard] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = 0

    def ensure_running(self) -> None:
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid != os.getpid():  # first use, or the child of a fork, where no thread survives
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
                self._pid = os.getpid()

    def _watch(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(_POLL_S)
            now = time.monotonic()
            stopped = max(0.0, now - last - 10 * _POLL_S)
            last = now
            for guard in list(self.guards.values()):
                guard.expires += stopped
                if now > guard.expires:
                    _end_process(guard)


def _end_process(guard: Guard) -> None:
    # The hung thread may hold a lock of the logging module, so the report gets a thread and a moment, not a
    # promise.
    try:
        report = threading.Thread(target=_report, args=(guard,), daemon=True)
        report.start()
        report.join(_REPORT_S)
    finally:
        os._exit(EXIT_HUNG)


def _report(guard: Guard) -> None:
    logger.critical(
        "process %d hung: %s took longer than %g s on %s; ending the process. Hint: %s.",
        os.getpid(),
        guard.what,
        guard.deadline_s,
        guard.where,
        guard.hint,
    )
    for handler in (*logging.getLogger().handlers, *logger.handlers):
        handler.flush()


_watcher = _Watcher()
