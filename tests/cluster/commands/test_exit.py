"""Ctrl-C in a process that started Ray by itself leaves nothing running behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from support.gguf_models import tiny_config, write_model

SCRIPT = """
import sys
from support.fake_stage_actor import FakeStageActor
from support.llms import llm_of
from redshard import SamplingParams

print("starting", flush=True)
llm = llm_of(FakeStageActor)(sys.argv[1], stages=2, device="cpu", max_context=256)
params = SamplingParams(max_tokens=50, ignore_eos=True)
print(llm.generate([[1, 2]], params)[0].finish_reason, flush=True)
while True:
    llm.generate([[1, 2]], params)
"""
MARK = "REDSHARD_TEST_EXIT"


def marked(mark: str) -> list[str]:
    """The command lines of all processes that have the mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.parametrize(
    ("last_line", "n_processes"),
    [("starting\n", 3), ("length\n", 6)],  # Ray is being started; workers generate
    ids=["while starting", "while generating"],
)
def test_no_process_is_left(tmp_path: Path, last_line: str, n_processes: int) -> None:
    model = write_model(tmp_path / "tiny.gguf", tiny_config())
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RAY_ADDRESS": "",
            MARK: mark,
        },
    )
    assert process.stdout is not None
    assert last_line in iter(process.stdout.readline, "")
    wait_until(lambda: len(marked(mark)) >= n_processes)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert process.returncode != -signal.SIGSEGV
    wait_until(lambda: not marked(mark))


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
