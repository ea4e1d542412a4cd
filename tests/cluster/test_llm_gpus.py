"""A pipeline of two stages on stand-in AMD GPUs, by real Ray: answers, and GPUs that fail in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.stages import Pipeline
from support.standin_stage_actor import standin_stage_actor

from cluster.completion import Completion
from cluster.errors import ModelError, PipelineError
from cluster.llm import LLM
from cluster.sampling_params import SamplingParams
from worker.configuration import Deadlines, WorkerConfiguration

MODEL = Path(__file__).parents[1] / "data" / "conformance" / "qwen3.q8_0.gguf"
PROMPTS = [f"{word} " * (3 * i + 1) for i, word in enumerate(["the", "rain", "in", "an"])]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

OpenLLM = Callable[..., LLM]


@pytest.fixture
def open_llm(ray_instance: None, tmp_path: Path) -> Iterator[OpenLLM]:
    """Opens a model on two stages; `trouble` gives ``STAGE.SETTING`` values to a stage's first worker."""
    opened: list[LLM] = []

    def opener(trouble: dict[str, int] | None = None) -> LLM:
        for name, value in (trouble or {}).items():
            (tmp_path / name).write_text(str(value))
        opened.append(
            LLM(
                MODEL,
                stages=2,
                device="hip",
                max_context=128,
                max_sequences=4,
                worker=WorkerConfiguration(
                    deadlines=Deadlines(allocate_s=5, copy_s=30, step_s=30, start_s=60)
                ),
                stage_class=standin_stage_actor(tmp_path),
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


def test_two_gpus_answer_like_the_cpu(open_llm: OpenLLM) -> None:
    llm = open_llm()
    check(llm.generate(PROMPTS, GREEDY))
    stats = llm.stats()
    assert [worker["device"] for worker in stats["workers"]] == ["Stand-in GPU 0"] * 2
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


@pytest.mark.parametrize("trouble", ["0.FAIL_LAUNCH", "1.FAIL_LAUNCH", "1.LOSE_DEVICE"])
def test_a_gpu_that_fails_costs_a_pause(open_llm: OpenLLM, trouble: str) -> None:
    llm = open_llm({trouble: 150})
    check(llm.generate(PROMPTS, GREEDY))
    assert llm.stats()["times"]["restarts"] == 1


def test_a_gpu_that_hangs_while_it_loads_is_reported(open_llm: OpenLLM) -> None:
    with pytest.raises((PipelineError, ModelError), match="died while it loaded"):
        open_llm({"1.HANG_ALLOCATION": 3})
