"""Several models in one process that share a Ray they started themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.gguf_models import tiny_config, write_model

from redshard.cluster.errors import PipelineError
from redshard.cluster.pipeline import ray_session

SCRIPT = """
import asyncio, sys, threading, time
import ray
from support.fake_stage_actor import FakeStageActor
from support.llms import llm_of
from support.fake_worker import generate
from redshard import PipelineError, RequestError, SamplingParams

params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)

def load():
    return llm_of(FakeStageActor)(sys.argv[1], device="cpu", max_context=64)

def check_closed(llm):
    calls = [
        lambda: llm.generate([[1]], params),
        lambda: list(llm.stream([[1]], params)),
        lambda: asyncio.run(llm.agenerate([[1]], params)),
        lambda: llm.logits([1]),
        llm.stats,
        llm.memory_map,
    ]
    for call in calls:
        try:
            call()
        except PipelineError as error:
            assert "the model was closed" in str(error), error
        else:
            raise AssertionError("a closed model answers")

first, second = load(), load()
first.close()
check_closed(first)
assert second.generate([[1, 2]], params)[0].token_ids == generate([1, 2], 5, 1)
second.close()
assert not ray.is_initialized()
check_closed(second)
assert not ray.is_initialized()

third = load()
failed = []

def ask_on():
    try:
        while True:
            third.generate([[1]], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    except Exception as error:
        failed.append(error)

asking = [threading.Thread(target=ask_on) for _ in range(4)]
for thread in asking:
    thread.start()
time.sleep(1)
ray.shutdown()
for thread in asking:
    thread.join(20)
assert len(failed) == 4, failed
assert all(isinstance(error, PipelineError | RequestError) for error in failed), failed
assert not ray.is_initialized()
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
try:
    third.stats()
except PipelineError as error:
    assert "has left the Ray cluster" in str(error) or "coordinator is gone" in str(error), error
third.close()
assert ray.is_initialized()
print("done")
"""


def test_ray_ends_with_its_last_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf", tiny_config())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_ADDRESS": ""}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, model], capture_output=True, text=True, env=environment, timeout=120
    )
    assert process.stdout == "done\n", process.stderr


def test_variables_that_ray_refuses_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "_current", lambda: None)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    with pytest.raises(PipelineError, match="ROCR_VISIBLE_DEVICES=1 is set without HIP_VISIBLE_DEVICES"):
        ray_session.connect()
