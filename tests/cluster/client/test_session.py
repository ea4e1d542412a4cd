"""Callers of one model on real Ray: whatever becomes of one, the others are served."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from support.fake_stage_actor import FakeStageActor
from support.fake_worker import generate
from support.gguf_models import tiny_config, write_model
from support.llms import llm_of

from redshard.cluster.client import llm as llm_module
from redshard.cluster.client.llm import LLM
from redshard.cluster.client.session import ClientSession
from redshard.cluster.engine.requests import Increment, Request
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ParameterError

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(ray_instance: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = write_model(tmp_path_factory.mktemp("models") / "tiny.gguf", tiny_config(n_layers=4))
    with llm_of(FakeStageActor)(model, stages=2, device="cpu", max_context=256) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _others_are_served(llm: LLM) -> Iterator[None]:
    """After every test, the model answers and nothing runs for nobody."""
    yield
    assert llm.generate([5, 6], SHORT)[0].token_ids == generate([5, 6], 10, 2)
    wait_until(lambda: n_unfinished(llm) == 0)


def inside(llm: LLM, look: Callable[[Any], Any]) -> Any:
    """Call a function on the coordinator, in its process."""
    return ray.get(llm._coordinator.__ray_call__.remote(look))


def n_unfinished(llm: LLM) -> int:
    """Requests that wait or run."""
    return inside(llm, lambda self: len(self._unfinished) + self._engine._scheduler.n_unfinished)


def wait_until(is_so: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_half_read_stream_of_a_closed_event_loop(llm: LLM) -> None:
    loop = asyncio.new_event_loop()
    stream = llm.astream([1, 2], LONG)
    loop.run_until_complete(anext(stream))
    loop.close()
    assert llm.generate([3, 4], SHORT)[0].token_ids == generate([3, 4], 10, 2)


def test_answers_that_come_too_late(llm: LLM) -> None:
    for timeout in np.random.default_rng().uniform(0, 0.1, 10):
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(asyncio.wait_for(llm.agenerate([[i] for i in range(1, 60)], LONG), timeout))


def test_receivers_that_raise(llm: LLM) -> None:
    def refuse(increment: Increment) -> None:
        raise RuntimeError("not today")

    session = llm._session
    for stream in (True, False):
        request = Request(session.new_id(), [1], LONG, stream=stream, client=session.name)
        session.wait(session.register([request], refuse))


def test_aborts_that_could_overtake_their_requests(llm: LLM) -> None:
    def make_slow(coordinator: Any) -> None:
        """Have the coordinator's threads take their time over a request, each another."""
        prepare = coordinator.prepare_at_once = coordinator._prepare

        def slowly(request: Request) -> Any:
            time.sleep(np.random.default_rng().uniform(0, 0.2))
            return prepare(request)

        coordinator._prepare = slowly

    inside(llm, make_slow)
    generated = llm.stats()["times"]["generated"]
    session, got = llm._session, queue.SimpleQueue[Increment]()
    requests = [Request(session.new_id(), [i], LONG, client=session.name) for i in range(1, 40)]
    for number, request in enumerate(requests):
        session.register([request], got.put)
        time.sleep(0.02 * (number % 3))
        session.forget([request])
    time.sleep(0.5)  # until the last submission has been taken
    inside(llm, lambda self: setattr(self, "_prepare", self.prepare_at_once))
    wait_until(lambda: n_unfinished(llm) == 0)
    assert llm.stats()["times"]["generated"] - generated < 0.2 * len(requests) * LONG.max_tokens


def test_two_clients_of_one_coordinator(llm: LLM) -> None:
    other = ClientSession(llm._coordinator, llm._session._ray_session)
    assert other.new_id() != llm._session.new_id()
    arrived = {session.name: queue.SimpleQueue[Increment]() for session in (llm._session, other)}
    for prompt, session in enumerate((llm._session, other), 1):
        requests = [Request(session.new_id(), [prompt], LONG, client=session.name) for _ in range(5)]
        session.wait(session.register(requests, arrived[session.name].put))
    for prompt, session in enumerate((llm._session, other), 1):
        for _ in range(5):
            increment = arrived[session.name].get(timeout=20)
            assert increment.request_id.startswith(session.name)
            assert increment.token_ids == generate([prompt], 200, 2)


def test_errors_of_a_submission_are_those_the_coordinator_raised(llm: LLM) -> None:
    session = llm._session
    request = Request(session.new_id(), [1], LONG, client=session.name)
    for wait in (session.wait, lambda reference: asyncio.run(asyncio.to_thread(session.wait, reference))):
        with pytest.raises(ParameterError, match=r"^request '.*' is already there$"):
            wait(session.register([request, request], lambda increment: None))
        session.forget([request])


def test_a_call_with_more_requests_than_its_window(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "_WINDOW", 8)
    monkeypatch.setattr(llm_module, "_WINDOW_TOKENS", 100)
    seen: list[int] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.01):
            seen.append(n_unfinished(llm))

    watcher = threading.Thread(target=watch)
    watcher.start()
    prompts = [[i % 60 + 1] * (1 + 3 * i) for i in range(60)]
    completions = llm.generate(prompts, SHORT)
    asynchronous = asyncio.run(llm.agenerate(prompts, SHORT))
    watching.set()
    watcher.join()
    expected = [generate(prompt, 10, 2) for prompt in prompts]
    assert [completion.token_ids for completion in completions] == expected
    assert [completion.token_ids for completion in asynchronous] == expected
    assert 0 < max(seen) <= 2 * 8  # in the exchange and in the scheduler


def test_logits_come_in_parts(llm: LLM) -> None:
    tokens = np.random.default_rng().integers(1, 60, 250).tolist()
    whole = llm.logits(tokens)
    for end in (1, 64, 65, 128):
        np.testing.assert_array_equal(llm.logits(tokens[:end]), whole[:end])
