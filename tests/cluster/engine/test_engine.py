"""The run loop against toy stages in the same process: text, stop strings, aborts, and stages that die."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.fake_worker import N_VOCAB, FakeStage, generate, logits

from redshard.cluster.engine import exchange
from redshard.cluster.engine.engine import Engine, StepLost, StepRefused
from redshard.cluster.engine.exchange import Exchange
from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.engine.scheduler import MAX_DEATHS, STEPS_AHEAD, Scheduler
from redshard.cluster.errors import ParameterError, PipelineError
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
    unspeakable: int | None = None

    def is_special(self, token: int) -> bool:
        return token in self.eog_ids

    def token_bytes(self, token: int) -> bytes:
        if token == self.unspeakable:
            raise RuntimeError("no letter for that")
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


class Served(Exchange):
    """An exchange with its engine, as a coordinator is one."""

    def __init__(self, stages: ToyStages, tokenizer: LetterTokenizer) -> None:
        super().__init__()
        self.engine = Engine(Scheduler(LIMITS, 2), stages, tokenizer, self)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def tokenizer() -> LetterTokenizer:
    return LetterTokenizer()


@pytest.fixture
def served(stages: ToyStages, tokenizer: LetterTokenizer) -> Iterator[Served]:
    served = Served(stages, tokenizer)
    yield served
    served.close()
    assert not served.engine._thread.is_alive()


def request(name: str, prompt: list[int], *, stream: bool = False, **params: object) -> Request:
    """A greedy request."""
    values = {"temperature": 0, "max_tokens": 20, "ignore_eos": True} | params
    return Request(name, prompt, SamplingParams(**values), stream=stream)


def collect(served: Exchange, n: int, timeout: float = 20, client: str = "") -> dict[str, list[Increment]]:
    """Increments of `n` requests until all have ended."""
    increments: dict[str, list[Increment]] = {}
    deadline = time.monotonic() + timeout
    while sum(parts[-1].is_last for parts in increments.values()) < n:
        assert time.monotonic() < deadline
        for increment in served.poll(1.0, client):
            increments.setdefault(increment.request_id, []).append(increment)
    return increments


def text(tokens: list[int]) -> str:
    """Letters of the tokens that are not special."""
    return "".join(LETTERS[token] for token in tokens if token not in LetterTokenizer.eog_ids)


PROMPTS = {f"r{i}": [i + 1, 2 * i + 1, 5] * (i + 1) for i in range(12)}


def test_many_requests_are_answered_as_each_alone(served: Served) -> None:
    served.add([request(name, prompt) for name, prompt in PROMPTS.items()])
    for name, (only,) in collect(served, len(PROMPTS)).items():
        expected = generate(PROMPTS[name], 20, 2)
        assert only.token_ids == expected
        assert only.text == text(expected)
        assert only.finish_reason == "length"
        assert 0 < only.first_token_s <= only.total_s


def test_streams_report_every_token(served: Served) -> None:
    served.add([request("a", [1, 2], stream=True, logprobs=2)])
    parts = collect(served, 1)["a"]
    expected = generate([1, 2], 20, 2)
    assert len(parts) == 20
    assert [token for part in parts for token in part.token_ids] == expected
    assert "".join(part.text for part in parts) == text(expected)
    assert [part.finish_reason for part in parts] == [None] * 19 + ["length"]
    for part in parts:
        (logprob,) = part.logprobs
        assert logprob.token_id == part.token_ids[0] == logprob.top[0][0]
        assert len(logprob.top) == 2


def test_stop_strings_end_the_text_before_them(served: Served) -> None:
    whole = text(generate([3, 4], 20, 2))
    stop = whole[7:10]
    served.add([request("a", [3, 4], stop=[stop], max_tokens=100, stream=True)])
    parts = collect(served, 1)["a"]
    assert "".join(part.text for part in parts) == whole[: whole.index(stop)]
    assert parts[-1].finish_reason == "stop"
    served.add([request("b", [3, 4], stop=["not in there"])])
    assert collect(served, 1)["b"][0].text == whole


def test_end_of_generation_and_stop_tokens_are_not_text(served: Served) -> None:
    expected = generate([3, 4], 20, 2)
    end = expected.index(expected[6])
    served.add([request("a", [3, 4], stop_token_ids=[expected[6]])])
    (only,) = collect(served, 1)["a"]
    assert only.token_ids == expected[: end + 1]
    assert only.text == text(expected[:end])
    assert only.finish_reason == "stop"

    name, tokens = next(
        (f"{i}", tokens) for i in range(500) if 60 in (tokens := generate([i % 64, i // 64], 20, 2))
    )
    i = int(name)
    served.add([request(name, [i % 64, i // 64], ignore_eos=False)])
    (only,) = collect(served, 1)[name]
    assert only.token_ids == tokens[: tokens.index(60) + 1]
    assert only.finish_reason == "stop"


def test_aborted_requests_are_never_heard_of_again(served: Served, stages: ToyStages) -> None:
    stages.slow.set()
    served.add([request("a", [1], max_tokens=100, stream=True), request("b", [2], max_tokens=30)])
    served.poll(1.0)
    served.abort(["a", "nobody"])
    increments = collect(served, 1)
    assert increments["b"][0].token_ids == generate([2], 30, 2)
    assert not any(part.is_last for part in increments.get("a", []))


def test_logits_of_every_position(served: Served) -> None:
    tokens = list(range(50))
    served.add([Request("a", tokens, SamplingParams(), wants_logits=True), request("b", [1])])
    increments = collect(served, 2)
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


def test_lost_steps_cost_no_request_and_no_token(served: Served, stages: ToyStages) -> None:
    stages.fail_at = {2, 3, 15, 40}
    served.add([request(name, prompt, stream=True) for name, prompt in PROMPTS.items()])
    for name, parts in collect(served, len(PROMPTS)).items():
        assert [token for part in parts for token in part.token_ids] == generate(PROMPTS[name], 20, 2)
    assert stages.restored == 4
    assert served.engine.times.restarts == 4
    assert served.engine.state == "serving"


def test_a_request_that_kills_its_workers_is_given_up_alone(served: Served, stages: ToyStages) -> None:
    stages.poison = 63
    prompts = {name: prompt for name, prompt in PROMPTS.items() if 63 not in generate(prompt, 20, 2)}
    assert len(prompts) > 3
    served.add([request(name, prompt) for name, prompt in prompts.items()] + [request("bad", [63, 1])])
    increments = collect(served, len(prompts) + 1)
    assert f"{MAX_DEATHS} times" in increments.pop("bad")[0].error
    assert stages.restored == MAX_DEATHS
    for name, (only,) in increments.items():
        assert only.token_ids == generate(prompts[name], 20, 2)


def test_a_death_in_each_chunk_of_a_long_prompt_does_not_lose_it(served: Served, stages: ToyStages) -> None:
    prompt = [7, 8, 9] * 33  # four chunks: each death comes one chunk later than the one before
    stages.fail_at = {2, 5, 9}
    served.add([request("long", prompt)])
    assert collect(served, 1)["long"][0].token_ids == generate(prompt, 20, 2)
    assert stages.restored == 3


def test_a_long_prompt_that_kills_late_is_given_up_too(served: Served, stages: ToyStages) -> None:
    stages.poison = 63
    served.add([request("bad", [1] * 90 + [63])])
    assert f"{MAX_DEATHS} times" in collect(served, 1)["bad"][0].error


def test_a_step_that_no_stage_takes_fails_its_requests_alone(served: Served, stages: ToyStages) -> None:
    stages.unusable = 63
    served.add([request("good", [1, 2], max_tokens=5)])
    assert collect(served, 1)["good"][0].error is None
    served.add([request("bad", [63, 1])])
    assert "no such token" in collect(served, 1)["bad"][0].error
    served.add([request("next", [1, 2], max_tokens=5)])
    assert collect(served, 1)["next"][0].token_ids == generate([1, 2], 5, 2)
    assert stages.restored == 0


def test_a_request_that_is_no_sequence_fails_alone(served: Served) -> None:
    served.add([Request("bad", [1], SamplingParams(), seed=-(2**70)), request("good", [1, 2])])
    increments = collect(served, 2)
    assert "cannot be run" in increments["bad"][0].error
    assert increments["good"][0].token_ids == generate([1, 2], 20, 2)
    assert served.engine.state == "serving"


def test_stages_that_cannot_be_restored_fail_every_request_clearly(served: Served, stages: ToyStages) -> None:
    stages.hopeless, stages.fail_at = True, {3}
    served.add([request("a", [1]), request("b", [2])])
    increments = collect(served, 2)
    assert all("no GPU is left" in parts[-1].error for parts in increments.values())
    assert served.engine.state == "failed"
    with pytest.raises(PipelineError, match="no GPU is left"):
        served.add([request("c", [1])])
    with pytest.raises(PipelineError, match="no GPU is left"):
        served.poll(1.0)


def test_closing_ends_what_is_unfinished(served: Served, stages: ToyStages) -> None:
    stages.slow.set()
    served.add([request("a", [1], max_tokens=100)])
    served.close()
    (only,) = served.poll(1.0)
    assert "closed" in only.error


# Callers are kept apart


def wait_until(is_so: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_client_polls_what_is_its_own(served: Served) -> None:
    clients = {f"client-{i}": [i + 1, 3] for i in range(3)}
    for client, prompt in clients.items():
        served.add([replace(request(f"{client}-{n}", prompt, stream=True), client=client) for n in range(2)])
    for client, prompt in clients.items():
        increments = collect(served, 2, client=client)
        assert set(increments) == {f"{client}-0", f"{client}-1"}
        for parts in increments.values():
            assert [token for part in parts for token in part.token_ids] == generate(prompt, 20, 2)


def test_an_id_that_is_there_already_is_refused(served: Served, stages: ToyStages) -> None:
    stages.slow.set()
    served.add([request("a", [1, 2])])
    with pytest.raises(ParameterError, match="'a' is already there"):
        served.add([request("b", [1]), request("a", [3])])
    assert collect(served, 1)["a"][0].token_ids == generate([1, 2], 20, 2)
    assert served.find("b") is None


def test_an_abort_is_heeded_at_any_moment(served: Served, stages: ToyStages) -> None:
    stages.slow.set()
    pauses = np.random.default_rng().uniform(0, 0.03, 40)
    for n, pause in enumerate(pauses):
        served.add([request(f"gone-{n}", [n % 60 + 1] * (n + 1), max_tokens=50, stream=n % 2 == 0)])
        time.sleep(pause if n % 4 else 0)
        served.abort([f"gone-{n}"])
    served.add([request("stays", [1, 2])])
    assert collect(served, 1)["stays"][-1].token_ids == generate([1, 2], 20, 2)
    assert not served._unfinished
    assert served.engine._scheduler.n_unfinished == 0


def test_an_error_in_delivering_ends_that_request_alone(served: Served, tokenizer: LetterTokenizer) -> None:
    answers = {name: generate(prompt, 20, 2) for name, prompt in PROMPTS.items()}
    tokenizer.unspeakable = answers["r0"][10]
    served.add([request(name, prompt) for name, prompt in PROMPTS.items()])
    for name, (only,) in collect(served, len(PROMPTS)).items():
        if tokenizer.unspeakable in answers[name]:
            assert only.error == "its output cannot be delivered: no letter for that"
        else:
            assert only.token_ids == answers[name]
    assert served.engine.state == "serving"
    assert served.engine._scheduler.n_unfinished == 0


def test_logits_pause_until_they_are_polled_and_others_go_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 4 * LIMITS.max_outputs * N_VOCAB
    monkeypatch.setattr(exchange, "MAX_LOGITS_BYTES", 2 * part)
    tokens = list(range(60))
    served.add([Request(name, tokens, SamplingParams(), wants_logits=True) for name in ("a", "b")])
    wait_until(lambda: served.is_full_of_logits)
    served.add([replace(request("c", [1, 2]), client="another")])
    assert collect(served, 1, client="another")["c"][0].token_ids == generate([1, 2], 20, 2)
    in_flight = 2 + STEPS_AHEAD
    assert served._logits_bytes <= (2 + in_flight) * part

    schedules = served.engine._scheduler.schedule
    calls: list[None] = []
    monkeypatch.setattr(served.engine._scheduler, "schedule", lambda: calls.append(None) or schedules())
    time.sleep(0.2)
    assert len(calls) < 3, "the engine turns in circles"
    for parts in collect(served, 2).values():
        rows = sorted((part.logits_start, len(part.logits)) for part in parts)
        assert [start for start, _ in rows] == list(range(0, len(tokens), LIMITS.max_outputs))
        assert sum(n for _, n in rows) == len(tokens)
    assert served._logits_bytes == 0


def test_what_waits_is_bounded(served: Served, stages: ToyStages, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.slow.set()
    monkeypatch.setattr(exchange, "MAX_REQUESTS", 3)
    served.add([request(f"r{i}", [i + 1]) for i in range(5)])
    increments = collect(served, 5)
    errors = {name for name, parts in increments.items() if "3 requests wait or run" in str(parts[-1].error)}
    assert errors == {"r3", "r4"}
    monkeypatch.setattr(exchange, "MAX_PROMPT_TOKENS", 10)
    served.add([request("a", [1] * 6), request("b", [1] * 6), request("c", [1] * 4)])
    increments = collect(served, 3)
    assert "at most 10" in increments["b"][0].error
    assert increments["a"][0].error is increments["c"][0].error is None
    served.add([request("d", [1] * 10)])
    assert collect(served, 1)["d"][0].error is None


def test_nothing_is_taken_before_there_is_an_engine() -> None:
    unserved = Exchange()
    for call in (lambda: unserved.add([request("a", [1])]), lambda: unserved.poll(1.0)):
        with pytest.raises(PipelineError, match="not loaded yet"):
            call()
