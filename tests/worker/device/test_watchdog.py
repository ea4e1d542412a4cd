"""A call that hangs ends the process, with a report; one that does not, costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from support.fake_device import FakeDevice

from redshard.worker.device.watchdog import EXIT_HUNG, Watchdog, hang_hint

PRELUDE = """
import logging, os, signal, sys, threading, time
import numpy as np
from support.fake_device import FakeDevice
from redshard.worker.configuration import Deadlines, PoolSettings
from redshard.worker.memory.pool import MemoryPool
from redshard.worker.device.watchdog import Watchdog
dog = Watchdog(FakeDevice())
"""


def run(script):
    """The exit status and standard error of a process that runs a script, and its seconds."""
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
        timeout=60,
    )
    return process.returncode, process.stderr, time.monotonic() - start


def test_a_hung_block_ends_the_process_with_a_report():
    status, report, seconds = run(
        "with dog.guard('allocating weights 3/7 (1.00 GiB)', 0.3):\n    time.sleep(3600)"
    )
    assert status == EXIT_HUNG
    for part in ("allocating weights 3/7 (1.00 GiB)", "0.3 s", "cpu device fake (host)", "Hint: look for"):
        assert part in report
    assert report.count("\n") == 1
    assert seconds < 30


def test_a_block_that_ends_in_time_does_nothing():
    status, report, _ = run("with dog.guard('quick', 0.2):\n    pass\ntime.sleep(0.6)\nprint('done')")
    assert (status, report) == (0, "")


def test_a_block_that_raises_is_no_longer_watched():
    status, report, _ = run(
        "try:\n    with dog.guard('failing', 0.2):\n        raise OSError\n"
        "except OSError:\n    time.sleep(0.6)"
    )
    assert (status, report) == (0, "")


def test_the_innermost_block_that_hangs_is_the_one_reported():
    status, report, _ = run(
        "with dog.guard('outer', 60):\n    with dog.guard('inner', 0.2):\n        time.sleep(3600)"
    )
    assert status == EXIT_HUNG
    assert "inner" in report
    assert "outer" not in report


def test_guards_of_other_threads_are_watched_and_can_be_used_again():
    status, report, _ = run(
        "guard = dog.guard('a step', 0.5)\n"
        "for _ in range(20):\n    with guard:\n        time.sleep(0.05)\n"
        "def hang():\n    with guard:\n        time.sleep(3600)\n"
        "threading.Thread(target=hang, daemon=True).start()\n"
        "time.sleep(3600)"
    )
    assert status == EXIT_HUNG
    assert "a step" in report


@pytest.mark.parametrize("call", ["allocate", "synchronize", "copy_in"])
def test_a_hung_device_call_of_the_pool_ends_the_process(call):
    status, report, _ = run(
        "device = FakeDevice()\n"
        "pool = MemoryPool(device, PoolSettings(), Deadlines(allocate_s=0.3, copy_s=0.3))\n"
        f"device.hanging_call = {call!r}\n"
        "view = pool.allocate('logits', 5 << 20).view(0, 16)\n"
        "pool.write(view, np.zeros(16, np.uint8))"
    )
    assert status == EXIT_HUNG
    assert ("allocating 'logits' (5.0 MiB" if call == "allocate" else "writing 'logits' (16 bytes") in report


def test_a_thread_hung_inside_logging_cannot_keep_the_process():
    status, _, _ = run(
        "handler = logging.StreamHandler()\nlogging.getLogger().addHandler(handler)\n"
        "def hold():\n    handler.acquire()\n    time.sleep(3600)\n"
        "threading.Thread(target=hold, daemon=True).start()\ntime.sleep(0.2)\n"
        "with dog.guard('logging', 0.2):\n    time.sleep(3600)"
    )
    assert status == EXIT_HUNG


def test_the_child_of_a_fork_is_watched_too():
    status, report, _ = run(
        "with dog.guard('before', 60):\n    pass\n"
        "pid = os.fork()\n"
        "if not pid:\n    with dog.guard('child', 0.2):\n        time.sleep(3600)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert status == EXIT_HUNG
    assert "child" in report


def test_time_in_which_the_process_was_stopped_does_not_count():
    status, report, _ = run(
        "entered, enter = os.pipe()\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    with dog.guard('child', 3):\n        os.write(enter, b'.')\n        time.sleep(4.5)\n"
        "    os._exit(0)\n"
        "os.read(entered, 1)\n"
        "os.kill(pid, signal.SIGSTOP)\ntime.sleep(4.2)\nos.kill(pid, signal.SIGCONT)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert (status, report) == (0, "")


def test_a_guard_is_cheap():
    guard = Watchdog(FakeDevice()).guard("a step", 60)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(1000):
            with guard:
                pass
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 20e-6


@pytest.mark.parametrize(
    ("kind", "arch", "part"),
    [
        ("hip", "gfx1100", "amdgpu.cwsr_enable=0"),
        ("hip", "gfx1151", "amdgpu.cwsr_enable=0"),
        ("hip", "gfx942", "dmesg"),
        ("cuda", "sm_90", "Xid"),
        ("cpu", "x86-64", "memory"),
    ],
)
def test_hints_fit_the_device(kind, arch, part):
    assert part in hang_hint(kind, arch)
