"""End-to-end truth: the shipped model's answers through Ray, on one and two stages, batched and single."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from redshard.cluster.client.llm import LLM
from redshard.cluster.commands.demo_questions import QUESTIONS, DemoQuestion, is_right
from redshard.cluster.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=160)
#: The first question of each kind that `redshard demo` asks.
BATCH = list({question.task: question for question in reversed(QUESTIONS)}.values())


@pytest.fixture(scope="module", params=[1, 2], ids=lambda n: f"{n}-stages")
def llm(ray_instance: None, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """The demo model by its name, on one and two stages, one after the other."""
    with LLM("demo", stages=request.param, device="cpu", max_context=256, max_sequences=len(BATCH)) as llm:
        yield llm


def ask(llm: LLM, prompts: list[str]) -> list[str]:
    """The complete replies to `prompts`, generated as one batch."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    completions = llm.generate(chats, GREEDY)
    assert {completion.finish_reason for completion in completions} == {"stop"}
    return [completion.text for completion in completions]


def test_a_batch_of_every_kind_is_answered_right(llm: LLM) -> None:
    assert len(BATCH) == 15
    replies = ask(llm, [question.prompt for question in BATCH])
    assert not [pair for pair in zip(BATCH, replies, strict=True) if not is_right(*pair)]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 210 plus 64?", "274"),
        ("Reverse 'vine'.", "eniv"),
        ("Which country's capital is Zagreb?", "Croatia"),
        ("How many days has February 2001?", "28 days"),
    ],
)
def test_a_single_question_is_answered_right(llm: LLM, question: str, answer: str) -> None:
    (reply,) = ask(llm, [question])
    assert is_right(DemoQuestion("any", question, answer), reply), reply
