"""The benchmark of two GPUs, small, on stand-in GPUs: it needs no Ray and ends whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import standin

TESTS = Path(__file__).parents[1]
SMALL = ["--steps=2", "--repeats=2", "--sequences=1", "--max-tokens=16", "--context=48"]


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The script on two stand-in GPUs of given settings, where Ray cannot be imported."""
    (tmp_path / "ray.py").write_text("raise ImportError('Ray is not to be used')")
    return partial(_run_benchmark, tmp_path)


def _run_benchmark(without_ray: Path, **settings: str | int) -> subprocess.CompletedProcess[str]:
    script = str(TESTS / "benchmarks" / "bench_two_gpus.py")
    model = str(TESTS / "data" / "conformance" / "llama.q4_k.gguf")
    command = [sys.executable, script, model, "--device=hip", *SMALL]
    environment = (
        os.environ
        | standin.environment(devices=2, **settings)
        | {"PYTHONPATH": ":".join([str(without_ray), *sys.path])}
    )
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_both_ways_give_the_tokens_of_one_gpu(run_benchmark: Callable[..., Any]) -> None:
    process = run_benchmark()
    assert process.returncode == 0, process.stdout + process.stderr
    for way in ("host memory", "device memory"):
        for what in ("answers by {}, 1", "answers by {}, 2", "two GPUs, {}, 1", "two GPUs, {}, 4"):
            assert f"{what.format(way)} in flight: " in process.stdout
        assert f"| 16 | {way} | " in process.stdout
        assert f"| two GPUs, {way} | " in process.stdout
    assert process.stdout.count("identical to one GPU") == 10
    assert "the sender lives and gave InSlot(slot=1)" in process.stdout


def test_a_part_that_fails_leaves_the_others(run_benchmark: Callable[..., Any]) -> None:
    process = run_benchmark(bad_gpu=1, fail_launch=60)
    assert process.returncode == 1
    assert "FAILED: two GPUs, host memory: EOFError" in process.stdout
    assert "| one GPU, all in one batch | " in process.stdout
    assert "[loading once more: " in process.stdout
