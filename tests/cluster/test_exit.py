"""Ctrl-C in a process that started Ray by itself leaves nothing running behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.gguf_models import tiny_config, write_model

SCRIPT = """
import sys
from support.fake_stage_actor import FakeStageActor
from redshard import LLM, SamplingParams

llm = LLM(sys.argv[1], stages=2, device="cpu", max_context=256, stage_class=FakeStageActor)
params = SamplingParams(max_tokens=50, ignore_eos=True)
print(llm.generate([[1, 2]], params)[0].finish_reason, flush=True)
while True:
    llm.generate([[1, 2]], params)
"""


def descendants(pid: int) -> set[int]:
    """All processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found, todo = set(), {pid}
    while todo:
        todo = {child for child, parent in parents.items() if parent in todo} - found
        found |= todo
    return found


def test_no_process_is_left(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf", tiny_config())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_ADDRESS": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "length\n"
    below = descendants(process.pid)
    assert len(below) > 4
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    deadline = time.monotonic() + 20
    while left := [pid for pid in below if Path(f"/proc/{pid}/exe").exists()]:
        assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.1)
