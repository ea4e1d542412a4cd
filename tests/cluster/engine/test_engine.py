"""The run loop against toy stages in the same process: text, stop strings, aborts, and stages that die."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
from support.fake_worker import N_VOCAB, FakeStage, generate, logits

from redshard.cluster.engine.engine import Engine, StepLost, StepRefused
from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.engine.scheduler import MAX_DEATHS, Scheduler
from redshard.cluster.errors import PipelineError
from redshard.worker.model.step_batch import TABLE_ENTRY_DTYPE, StepBatch, StepResult
from redshard.worker.model.step_inputs import StepLimits

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
LIMITS = StepLimits(
    max_tokens=32, max_sequences=8, max_outputs=8, max_context=128, n_kv_blocks=60, block_size=4
)


class LetterTokenizer:
    """Every token is a letter."""

    n_vocab = N_VOCAB
    eog_ids = frozenset({60})

    def is_special(self, token: int) -> bool:
        return token in self.eog_ids

    def token_bytes(self, token: int) -> bytes:
        return LETTERS[token].encode()


class ToyStages:
    """Two toy stages that lose steps when told to."""

    def __init__(self) -> None:
        self.fail_at: set[int] = set()  # numbers of collected steps that get lost
        self.poison: int | None = None  # a token that kills every step it is in
        self.unusable: int | None = None  # a token that no stage takes
        self.hopeless = False
        self.restored = self.collected = 0
        self.slow = threading.Event()
        self._start()

    def _start(self) -> None:
        self.stages = [FakeStage(i, 2, LIMITS.n_kv_blocks, LIMITS.block_size) for i in range(2)]
        self.under_way: deque[StepBatch] = deque()

    @property
    def steps(self) -> ToyStages:
        return self

    def submit(self, batch: StepBatch) -> None:
        self.under_way.append(batch)

    def collect(self) -> StepResult:
        if self.slow.is_set():
            time.sleep(0.005)
        self.collected += 1
        batch = self.under_way.popleft()
        if self.collected in self.fail_at or self.poison in batch.token_ids:
            raise StepLost("a stage died")
        if self.unusable in batch.token_ids:
            raise StepRefused("no such token")
        result: np.ndarray | StepResult | None = None
        for stage in self.stages:
            result = stage.run(batch, result)
        return result

    def restore(self, loss: StepLost) -> None:
        if self.hopeless:
            raise PipelineError("no GPU is left")
        self.restored += 1
        self._start()


@pytest.fixture
def stages() -> ToyStages:
    return ToyStages()


@pytest.fixture
def engine(stages: ToyStages) -> Iterator[Engine]:
    engine = Engine(Scheduler(LIMITS, 2), stages, LetterTokenizer())
    yield engine
    engine.close()
    assert not engine._thread.is_alive()


def request(name: str, prompt: list[int], *, stream: bool = False, **params: object) -> Request:
    """A greedy request."""
    values = {"temperature": 0, "max_tokens": 20, "ignore_eos": True} | params
    return Request(name, prompt, SamplingParams(**values), stream=stream)


def collect(engine: Engine, n: int, timeout: float = 20) -> dict[str, list[Increment]]:
    """Increments of `n` requests until all have ended."""
    increments: dict[str, list[Increment]] = {}
    deadline = time.monotonic() + timeout
    while sum(parts[-1].is_last for parts in increments.values()) < n:
        assert time.monotonic() < deadline
        for increment in engine.poll(1.0):
            increments.setdefault(increment.request_id, []).append(increment)
    return increments


def text(tokens: list[int]) -> str:
    """Letters of the tokens that are not special."""
    return "".join(LETTERS[token] for token in tokens if token not in LetterTokenizer.eog_ids)


PROMPTS = {f"r{i}": [i + 1, 2 * i + 1, 5] * (i + 1) for i in range(12)}


def test_many_requests_are_answered_as_each_alone(engine: Engine) -> None:
    engine.add([request(name, prompt) for name, prompt in PROMPTS.items()])
    for name, (only,) in collect(engine, len(PROMPTS)).items():
        expected = generate(PROMPTS[name], 20, 2)
        assert only.token_ids == expected
        assert only.text == text(expected)
        assert only.finish_reason == "length"
        assert 0 < only.first_token_s <= only.total_s


def test_streams_report_every_token(engine: Engine) -> None:
    engine.add([request("a", [1, 2], stream=True, logprobs=2)])
    parts = collect(engine, 1)["a"]
    expected = generate([1, 2], 20, 2)
    assert len(parts) == 20
    assert [token for part in parts for token in part.token_ids] == expected
    assert "".join(part.text for part in parts) == text(expected)
    assert [part.finish_reason for part in parts] == [None] * 19 + ["length"]
    for part in parts:
        (logprob,) = part.logprobs
        assert logprob.token_id == part.token_ids[0] == logprob.top[0][0]
        assert len(logprob.top) == 2


def test_stop_strings_end_the_text_before_them(engine: Engine) -> None:
    whole = text(generate([3, 4], 20, 2))
    stop = whole[7:10]
    engine.add([request("a", [3, 4], stop=[stop], max_tokens=100, stream=True)])
    parts = collect(engine, 1)["a"]
    assert "".join(part.text for part in parts) == whole[: whole.index(stop)]
    assert parts[-1].finish_reason == "stop"
    engine.add([request("b", [3, 4], stop=["not in there"])])
    assert collect(engine, 1)["b"][0].text == whole


def test_end_of_generation_and_stop_tokens_are_not_text(engine: Engine) -> None:
    expected = generate([3, 4], 20, 2)
    end = expected.index(expected[6])
    engine.add([request("a", [3, 4], stop_token_ids=[expected[6]])])
    (only,) = collect(engine, 1)["a"]
    assert only.token_ids == expected[: end + 1]
    assert only.text == text(expected[:end])
    assert only.finish_reason == "stop"

    name, tokens = next(
        (f"{i}", tokens) for i in range(500) if 60 in (tokens := generate([i % 64, i // 64], 20, 2))
    )
    i = int(name)
    engine.add([request(name, [i % 64, i // 64], ignore_eos=False)])
    (only,) = collect(engine, 1)[name]
    assert only.token_ids == tokens[: tokens.index(60) + 1]
    assert only.finish_reason == "stop"


def test_aborted_requests_are_never_heard_of_again(engine: Engine, stages: ToyStages) -> None:
    stages.slow.set()
    engine.add([request("a", [1], max_tokens=100, stream=True), request("b", [2], max_tokens=30)])
    engine.poll(1.0)
    engine.abort(["a", "nobody"])
    increments = collect(engine, 1)
    assert increments["b"][0].token_ids == generate([2], 30, 2)
    assert not any(part.is_last for part in increments.get("a", []))


def test_logits_of_every_position(engine: Engine) -> None:
    tokens = list(range(50))
    engine.add([Request("a", tokens, SamplingParams(), wants_logits=True), request("b", [1])])
    increments = collect(engine, 2)
    stage = FakeStage(0, 2, 60, 4), FakeStage(1, 2, 60, 4)
    batch = StepBatch(
        0,
        np.array(tokens, np.int32),
        np.arange(50, dtype=np.int32),
        np.array([0, 50], np.int32),
        np.zeros(1, np.int32),
        np.array([(0, column, column) for column in range(13)], TABLE_ENTRY_DTYPE),
        np.arange(50, dtype=np.int32),
        return_logits=True,
    )
    expected = stage[1].run(batch, stage[0].run(batch, None)).logits
    assert logits(np.array([1])).shape == (1, N_VOCAB)
    parts = increments["a"]
    assert [part.logits_start for part in parts] == list(range(0, 50, 8))
    assert [part.finish_reason for part in parts] == [None] * 6 + ["stop"]
    np.testing.assert_array_equal(np.concatenate([part.logits for part in parts]), expected)
    assert increments["b"][0].token_ids == generate([1], 20, 2)


def test_lost_steps_cost_no_request_and_no_token(engine: Engine, stages: ToyStages) -> None:
    stages.fail_at = {2, 3, 15, 40}
    engine.add([request(name, prompt, stream=True) for name, prompt in PROMPTS.items()])
    for name, parts in collect(engine, len(PROMPTS)).items():
        assert [token for part in parts for token in part.token_ids] == generate(PROMPTS[name], 20, 2)
    assert stages.restored == 4
    assert engine.times.restarts == 4
    assert engine.state == "serving"


def test_a_request_that_kills_its_workers_is_given_up_alone(engine: Engine, stages: ToyStages) -> None:
    stages.poison = 63
    prompts = {name: prompt for name, prompt in PROMPTS.items() if 63 not in generate(prompt, 20, 2)}
    assert len(prompts) > 3
    engine.add([request(name, prompt) for name, prompt in prompts.items()] + [request("bad", [63, 1])])
    increments = collect(engine, len(prompts) + 1)
    assert f"{MAX_DEATHS} times" in increments.pop("bad")[0].error
    assert stages.restored == MAX_DEATHS
    for name, (only,) in increments.items():
        assert only.token_ids == generate(prompts[name], 20, 2)


def test_a_death_in_each_chunk_of_a_long_prompt_does_not_lose_it(engine: Engine, stages: ToyStages) -> None:
    prompt = [7, 8, 9] * 33  # four chunks: each death comes one chunk later than the one before
    stages.fail_at = {2, 5, 9}
    engine.add([request("long", prompt)])
    assert collect(engine, 1)["long"][0].token_ids == generate(prompt, 20, 2)
    assert stages.restored == 3


def test_a_long_prompt_that_kills_late_is_given_up_too(engine: Engine, stages: ToyStages) -> None:
    stages.poison = 63
    engine.add([request("bad", [1] * 90 + [63])])
    assert f"{MAX_DEATHS} times" in collect(engine, 1)["bad"][0].error


def test_a_step_that_no_stage_takes_fails_its_requests_alone(engine: Engine, stages: ToyStages) -> None:
    stages.unusable = 63
    engine.add([request("good", [1, 2], max_tokens=5)])
    assert collect(engine, 1)["good"][0].error is None
    engine.add([request("bad", [63, 1])])
    assert "no such token" in collect(engine, 1)["bad"][0].error
    engine.add([request("next", [1, 2], max_tokens=5)])
    assert collect(engine, 1)["next"][0].token_ids == generate([1, 2], 5, 2)
    assert stages.restored == 0


def test_a_request_that_is_no_sequence_fails_alone(engine: Engine) -> None:
    engine.add([Request("bad", [1], SamplingParams(), seed=-(2**70)), request("good", [1, 2])])
    increments = collect(engine, 2)
    assert "cannot be run" in increments["bad"][0].error
    assert increments["good"][0].token_ids == generate([1, 2], 20, 2)
    assert engine.state == "serving"


def test_stages_that_cannot_be_restored_fail_every_request_clearly(engine: Engine, stages: ToyStages) -> None:
    stages.hopeless, stages.fail_at = True, {3}
    engine.add([request("a", [1]), request("b", [2])])
    increments = collect(engine, 2)
    assert all("no GPU is left" in parts[-1].error for parts in increments.values())
    assert engine.state == "failed"
    with pytest.raises(PipelineError, match="no GPU is left"):
        engine.add([request("c", [1])])
    with pytest.raises(PipelineError, match="no GPU is left"):
        engine.poll(1.0)


def test_closing_ends_what_is_unfinished(engine: Engine, stages: ToyStages) -> None:
    stages.slow.set()
    engine.add([request("a", [1], max_tokens=100)])
    engine.close()
    (only,) = engine.poll(1.0)
    assert "closed" in only.error
