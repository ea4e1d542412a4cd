"""A pipeline of two stages on stand-in AMD GPUs, by real Ray: answers, and GPUs that fail in the middle."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from support.llms import llm_of
from support.stages import Pipeline
from support.standin_stage_actor import standin_stage_actor

from redshard.cluster.client.llm import LLM
from redshard.cluster.completion import Completion
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import PipelineError
from redshard.worker.configuration import Deadlines, WorkerConfiguration

MODEL = Path(__file__).parents[2] / "data" / "conformance" / "qwen3.q8_0.gguf"
PROMPTS = [f"{word} " * (3 * i + 1) for i, word in enumerate(["the", "rain", "in", "an"])]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

OpenLLM = Callable[..., LLM]


@pytest.fixture
def open_llm(ray_instance: None, tmp_path: Path) -> Iterator[OpenLLM]:
    """Opens a model on two stages; `trouble` is what `standin_stage_actor` finds in its directory."""
    opened: list[LLM] = []

    def opener(trouble: dict[str, int] | None = None, **deadlines: float) -> LLM:
        for name, value in (trouble or {}).items():
            (tmp_path / name).write_text(str(value))
        opened.append(
            llm_of(standin_stage_actor(tmp_path))(
                MODEL,
                stages=2,
                device="hip",
                max_context=128,
                max_sequences=4,
                worker=WorkerConfiguration(
                    deadlines=Deadlines(
                        **{"allocate_s": 5, "copy_s": 30, "step_s": 30, "start_s": 60} | deadlines
                    )
                ),
            )
        )
        return opened[-1]

    yield opener
    for llm in opened:
        llm.close()


def check(completions: list[Completion]) -> None:
    """Every token is as good as the CPU's best, given those before it."""
    with Pipeline(MODEL) as pipeline:
        for completion in completions:
            prompt, answer = completion.prompt_token_ids, completion.token_ids
            assert len(answer) == 20
            logits = pipeline.logits_in_chunks(np.array([*prompt, *answer[:-1]], np.int32))[len(prompt) - 1 :]
            chosen = np.take_along_axis(logits, np.array(answer)[:, None], axis=1)[:, 0]
            assert (logits.max(axis=1) - chosen < 0.15 * logits.std()).all()


def devices(llm: LLM) -> set[str]:
    """Names of the workers' GPUs."""
    return {worker["device"] for worker in llm.stats()["workers"]}


def test_two_gpus_answer_like_the_cpu(open_llm: OpenLLM) -> None:
    llm = open_llm()
    check(llm.generate(PROMPTS, GREEDY))
    stats = llm.stats()
    assert devices(llm) == {"Stand-in GPU 0", "Stand-in GPU 1"}
    assert stats["times"]["restarts"] == 0
    assert stats["workers"][0]["sends_by"] == "device memory"


@pytest.mark.parametrize("trouble", ["0.REFUSE_IPC", "0.FAULT_ON_PEER_WRITES"])
def test_gpus_that_do_not_reach_each_other_use_host_memory(open_llm: OpenLLM, trouble: str) -> None:
    llm = open_llm({trouble: 1})
    check(llm.generate(PROMPTS[:2], GREEDY))
    stats = llm.stats()
    assert stats["workers"][0]["sends_by"] == "host memory"
    assert stats["times"]["restarts"] == 0


@pytest.mark.parametrize("stage", [0, 1])
def test_a_killed_worker_is_replaced(open_llm: OpenLLM, stage: int) -> None:
    llm = open_llm()
    os.kill(llm.stats()["workers"][stage]["pid"], signal.SIGKILL)
    check(llm.generate(PROMPTS, GREEDY))
    assert llm.stats()["times"]["restarts"] == 1
    assert llm.stats()["workers"][0]["sends_by"] == "device memory"


def test_a_gpu_that_fails_costs_a_pause(open_llm: OpenLLM) -> None:
    llm = open_llm({"0.FAIL_LAUNCH": 150})
    check(llm.generate(PROMPTS, GREEDY))
    assert llm.stats()["times"]["restarts"] == 1


@pytest.mark.parametrize(
    ("trouble", "count", "restarts"),
    [
        ("HANG_ALLOCATION", 1, 0),
        ("HANG_ALLOCATION", 3, 0),
        ("FAIL_ALLOCATION", 3, 0),
        ("LOSE_DEVICE", 150, 1),
        ("HANG_LAUNCH", 150, 1),
    ],
)
def test_another_gpu_takes_the_place_of_a_bad_one(
    open_llm: OpenLLM, trouble: str, count: int, restarts: int
) -> None:
    """The bad GPU stays bad: it hangs or fails when it is opened, while it loads, or in mid-generation."""
    llm = open_llm({f"gpu1.{trouble}": count}, allocate_s=2, step_s=4)
    check(llm.generate(PROMPTS, GREEDY))
    assert devices(llm) == {"Stand-in GPU 0", "Stand-in GPU 2"}
    assert llm.stats()["times"]["restarts"] == restarts
    assert llm.stats()["workers"][0]["sends_by"] == "device memory"


@pytest.fixture
def reserved_gpu(ray_instance: None) -> Iterator[None]:
    """Leaves two GPUs of three to the tests."""
    group = placement_group([{"GPU": 1}])
    assert group.wait(10)
    yield
    remove_placement_group(group)


@pytest.mark.usefixtures("reserved_gpu")
def test_a_bad_gpu_without_another_ends_in_one_sentence(open_llm: OpenLLM) -> None:
    began = time.monotonic()
    with pytest.raises(PipelineError) as failed:
        open_llm({"gpu1.HANG_ALLOCATION": 3}, allocate_s=1)
    assert time.monotonic() - began < 40
    message = str(failed.value)
    assert "\n" not in message
    for part in ("GPU 1 of node", "failed 3 times", "died while it loaded"):
        assert part in message


def test_a_worker_that_does_not_get_on_with_loading_is_replaced(open_llm: OpenLLM) -> None:
    """Allocations may take forever, so that only the coordinator can notice."""
    llm = open_llm({"1.HANG_ALLOCATION": 3}, allocate_s=600, load_idle_s=3)
    check(llm.generate(PROMPTS[:1], GREEDY))
    assert llm.stats()["times"]["restarts"] == 0


def test_gpus_that_ray_counts_but_nobody_can_open_are_given_back(
    ray_instance: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), LLM(MODEL, device="auto", max_context=128) as llm:
        assert llm.stats()["workers"][0]["kind"] == "cpu"
        (warning,) = [record.getMessage() for record in caplog.records if record.name.endswith("client.llm")]
        for part in ("runs on CPUs", "Ray counts GPU", "no HIP runtime", "NVIDIA"):
            assert part in warning
        deadline = time.monotonic() + 10
        while ray.available_resources().get("GPU", 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
