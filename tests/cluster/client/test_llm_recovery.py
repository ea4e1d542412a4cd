"""The whole cluster on toy stages: real Ray, real processes, real kills."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from support.fake_stage_actor import FakeStageActor
from support.fake_worker import generate
from support.gguf_models import tiny_config, write_model
from support.llms import llm_of

from redshard.cluster.client.llm import LLM
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import CapacityError, PipelineError, RequestError
from redshard.worker.configuration import Deadlines, WorkerConfiguration
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_inputs import BatchError

GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PROMPTS = [[i, 2 * i, 7] * (i + 1) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with four layers, of which the toy stages only count."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny.gguf", tiny_config(n_layers=4))


@pytest.fixture(scope="module")
def llm(ray_instance: None, model: Path) -> Iterator[LLM]:
    """Two stages, and a short deadline."""
    worker = WorkerConfiguration(deadlines=Deadlines(step_s=2))
    with llm_of(FakeStageActor)(model, stages=2, device="cpu", max_context=256, worker=worker) as llm:
        yield llm


def pids(llm: LLM) -> list[int]:
    """The stages' processes."""
    return [worker["pid"] for worker in llm.stats()["workers"]]


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int]) -> None:
    """Processes end a moment after they are told to."""
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, [pid for pid in pids if is_alive(pid)]
        time.sleep(0.05)


@pytest.mark.parametrize(("stage", "kind"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_worker_that_dies_or_hangs_in_mid_generation_costs_a_pause(
    llm: LLM, stage: int, kind: signal.Signals
) -> None:
    victim = pids(llm)[stage]
    restarts = llm.stats()["times"]["restarts"]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for n, chunk in enumerate(llm.stream(PROMPTS, GREEDY)):
        tokens[chunk.index] += chunk.token_ids
        if n == 100:
            os.kill(victim, kind)
    assert tokens == [generate(prompt, 100, 2) for prompt in PROMPTS]
    assert llm.stats()["times"]["restarts"] == restarts + 1
    assert victim not in pids(llm)
    wait_until_dead([victim])


def test_a_worker_that_dies_while_nothing_runs_is_replaced_at_the_next_request(llm: LLM) -> None:
    victim = pids(llm)[1]
    restarts = llm.stats()["times"]["restarts"]
    os.kill(victim, signal.SIGKILL)
    wait_until_dead([victim])
    time.sleep(2)  # for Ray to hear of it
    assert llm.generate(PROMPTS[1], GREEDY)[0].token_ids == generate(PROMPTS[1], 100, 2)
    assert llm.stats()["times"]["restarts"] == restarts + 1
    assert victim not in pids(llm)


def test_requests_of_several_threads_share_the_batches(llm: LLM) -> None:
    steps = llm.stats()["times"]["steps"]
    results: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        results[i] = llm.generate(PROMPTS[i], GREEDY)[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: generate(prompt, 100, 2) for i, prompt in enumerate(PROMPTS)}
    assert llm.stats()["times"]["steps"] - steps < 100 * len(PROMPTS) * 0.8


def test_ending_a_stream_early_aborts_the_request(llm: LLM) -> None:
    generated = llm.stats()["times"]["generated"]
    stream = llm.stream([1, 2], GREEDY)
    next(stream)
    stream.close()
    assert llm.generate([3], GREEDY)[0].token_ids == generate([3], 100, 2)
    assert llm.stats()["times"]["generated"] - generated < 200


class PickyStageActor(FakeStageActor):
    def run(self, batch: StepBatch, hidden: np.ndarray | None = None) -> np.ndarray | StepResult:
        if self._stage_number == 0 and 63 in batch.token_ids:
            raise BatchError("token 63 is not to its taste")
        return super().run(batch, hidden)


def test_a_step_that_a_stage_refuses_fails_its_request_alone(ray_instance: None, model: Path) -> None:
    one = SamplingParams(temperature=0, max_tokens=1)
    with llm_of(PickyStageActor)(model, stages=2, device="cpu", max_context=256) as llm:
        before = pids(llm)
        with pytest.raises(RequestError, match="not to its taste"):
            llm.generate([[63, 1]], one)
        assert llm.generate([1, 2], one)[0].token_ids == generate([1, 2], 1, 2)
        assert pids(llm) == before
        assert llm.stats()["times"]["restarts"] == 0


def test_answers_beside_a_failed_one_are_kept(ray_instance: None, model: Path) -> None:
    prompts, one = [[1, 2], [63, 1], [3, 4]], SamplingParams(temperature=0, max_tokens=1)
    each_in_its_own_steps = {"max_sequences": 1}
    with llm_of(PickyStageActor)(model, device="cpu", max_context=256, **each_in_its_own_steps) as llm:
        with pytest.raises(RequestError, match=r"1 of 3 requests failed; the first: .*taste") as failed:
            llm.generate(prompts, one)
        completions = failed.value.completions
        assert [completion.finish_reason for completion in completions] == ["length", "error", "length"]
        assert completions[2].token_ids == generate([3, 4], 1, 1)
        chunks = llm.stream(prompts, one)
        ended = [(chunk.index, chunk.finish_reason) for chunk in itertools.islice(chunks, 3)]
        assert ended == [(0, "length"), (1, "error"), (2, "length")]
        with pytest.raises(RequestError):
            next(chunks)
        with pytest.raises(RequestError) as failed:
            asyncio.run(llm.agenerate(prompts, one))
        assert failed.value.completions[0].token_ids == generate([1, 2], 1, 1)
        with pytest.raises(RequestError, match=r"^a step of the request"):
            llm.logits([63])


class BrokenStageActor(FakeStageActor):
    def __init__(self, *arguments: Any) -> None:
        raise RuntimeError("this machine has no heart\nand no brain")


def test_the_reason_why_workers_do_not_start_is_one_sentence(ray_instance: None, model: Path) -> None:
    with pytest.raises(PipelineError) as failed:
        llm_of(BrokenStageActor)(model, device="cpu", max_context=256)
    assert re.fullmatch(
        r"the stages could not be brought up in 3 attempts: stage 0 on .* failed 3 times, the last time the "
        r"worker could not be started: RuntimeError: this machine has no heart \(its log .* says more\)",
        str(failed.value),
    )


def test_every_stage_on_gpus_has_one_of_its_own(ray_instance: None, model: Path) -> None:
    with llm_of(FakeStageActor)(model, stages=2, device="hip", max_context=256) as llm:
        workers = llm.stats()["workers"]
        os.kill(workers[0]["pid"], signal.SIGKILL)
        assert llm.generate([1, 2], GREEDY)[0].token_ids == generate([1, 2], 100, 2)
        replaced = llm.stats()["workers"]
    assert sorted(gpu for worker in workers for gpu in worker["gpus"]) == [0, 1]
    assert [worker["gpus"] for worker in replaced] == [[2], workers[1]["gpus"]]
    with pytest.raises(CapacityError, match=r"4 stages must have 4 GPUs, but the cluster has 3"):
        llm_of(FakeStageActor)(model, stages=4, device="hip")


class SettledStageActor(FakeStageActor):
    def load(self, *order: Any, **options: Any) -> dict[str, int]:
        if ray.get_gpu_ids() == [2]:
            raise FileNotFoundError("no such file here")
        return super().load(*order, **options)


def test_a_gpu_where_the_file_is_missing_is_left_again(ray_instance: None, model: Path) -> None:
    with llm_of(SettledStageActor)(model, stages=2, device="hip", max_context=256) as llm:
        workers = llm.stats()["workers"]
        os.kill(workers[0]["pid"], signal.SIGKILL)
        assert llm.generate([1, 2], GREEDY)[0].token_ids == generate([1, 2], 100, 2)
        assert [worker["gpus"] for worker in llm.stats()["workers"]] == [w["gpus"] for w in workers]


def test_nothing_is_left_after_closing(ray_instance: None, model: Path) -> None:
    with llm_of(FakeStageActor)(model, stages=2, device="cpu", max_context=256) as llm:
        processes = pids(llm)
        assert all(map(is_alive, processes))
    wait_until_dead(processes)
    states = {actor["ActorID"]: actor["State"] for actor in ray._private.state.actors().values()}
    assert states.pop(llm._coordinator._actor_id.hex()) == "DEAD"
