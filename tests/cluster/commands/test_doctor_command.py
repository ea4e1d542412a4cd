"""`redshard doctor` as people see it, with stand-in GPUs and without any."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import standin

COMMAND = """
import sys
from redshard.cluster.commands.cli import main
try:
    main()
finally:
    assert "ray" not in sys.modules
"""


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that has not loaded the stand-in."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_VISIBLE_DEVICES")}
    path = {"PYTHONPATH": ":".join(sys.path), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "doctor", *options],
        env=inherited | path | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_without_gpus() -> None:
    run = doctor()
    if "none: " not in run.stdout:
        pytest.skip("there is a GPU")
    assert run.returncode == 0, run.stderr
    for text in ("AMD GPUs", "NVIDIA GPUs", "libamdhip64.so", "takes the CPU: no GPU can be used", "GB/s"):
        assert text in run.stdout


def test_two_gpus() -> None:
    run = doctor(**standin.environment(devices=2, memory=64 << 20))
    assert run.returncode == 0, run.stdout + run.stderr
    for text in (
        "AMD GPU 0",
        "AMD GPU 1",
        "Stand-in GPU 1",
        "gfx1100",
        "HIP runtime 7.0.0",
        "GPU 1: yes",
        "right",
    ):
        assert text in run.stdout
    assert "takes the AMD GPUs" in run.stdout
    assert "failed" not in run.stdout


def test_a_gpu_that_fails_as_json() -> None:
    gpus = standin.environment(memory=64 << 20, lose_device=1)
    run = doctor("--json", **gpus, ROCR_VISIBLE_DEVICES="0")
    assert run.returncode == 1, run.stderr
    report = json.loads(run.stdout)
    assert report["device"] == "hip"
    assert report["healthy"] is False
    assert report["runtimes"]["hip"] == {"count": 1}
    failures = {check["name"] for check in report["gpus"][0]["checks"] if check["failure"]}
    assert failures == {"kernel result"}
    assert any("Ray refuses" in hint for hint in report["hints"])


def test_a_gpu_that_ends_its_process() -> None:
    run = doctor(**standin.environment(memory="none"))
    assert run.returncode == 1, run.stderr
    assert "SIGABRT" in run.stdout
    assert "1 of 1 GPUs failed a check" in run.stdout
    assert "hint: AMD GPU 0 did not answer: " in run.stdout
