"""Hidden states from process to process: through device memory, through host memory, and after a death."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import standin
from support.stage_process import StageProcess, connect
from support.stages import LIMITS, CachedSequence, Pipeline, split

from redshard.cluster.pipeline.stage_actor import EXIT_DEVICE_FAILED, StageActor
from redshard.worker.configuration import PoolSettings, WorkerConfiguration
from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import open_device
from redshard.worker.memory.pool import PoolError
from redshard.worker.model.handoff import InboxOffer, InSlot
from redshard.worker.model.step_inputs import BatchError
from redshard.worker.worker import Worker

MODEL = Path(__file__).parents[2] / "data" / "conformance" / "qwen3.q8_0.gguf"
LIMITS = replace(LIMITS, max_tokens=64, n_kv_blocks=128)
SEGMENT_BYTES = 1 << 18
CONFIGURATION = WorkerConfiguration(pool=PoolSettings(segment_bytes=SEGMENT_BYTES, alignment=256))
TOKENS = np.load(MODEL.with_suffix(".npz"))["tokens"].astype(np.int32)
CHUNKS = (1, 37, 2, 9)

Start = Callable[[int], StageProcess]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the process of a stage; each has a stand-in GPU of its own, and both see both."""
    standin.activate(monkeypatch, devices=2)
    started: list[StageProcess] = []

    def starter(stage: int) -> StageProcess:
        environment = {"HIP_VISIBLE_DEVICES": f"{stage},{1 - stage}"}
        started.append(StageProcess(partial(StageActor, stage, "hip", 2, CONFIGURATION), environment))
        return started[-1]

    yield starter
    for process in started:
        process.close()


def pipeline_of(start: Start) -> Pipeline:
    return Pipeline(MODEL, 2, workers=[start(0), start(1)], limits=LIMITS)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """Logits of a single worker."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        standin.activate(monkeypatch)
        with Pipeline(MODEL, devices=[open_device("hip")], limits=LIMITS) as pipeline:
            return pipeline.logits_in_chunks(TOKENS, *CHUNKS)


def test_device_and_host_memory_give_the_same_bits(start: Start, expected: np.ndarray) -> None:
    pipeline = pipeline_of(start)
    first, last = pipeline.workers
    for _ in range(2):
        assert connect(first, last, n_slots=2)
        assert first.call("stats")["sends_by"] == "device memory"
        np.testing.assert_array_equal(pipeline.logits_in_chunks(TOKENS, *CHUNKS), expected)
        first.call("disconnect")
        assert first.call("stats")["sends_by"] == "host memory"
        np.testing.assert_array_equal(pipeline.logits_in_chunks(TOKENS, *CHUNKS), expected)
    held = last.call("memory_map")
    assert [segment["name"] for segment in held["segments"]].count("inbox") == 1
    assert held["allocations"] <= -(-last.call("stats")["weight_bytes"] // SEGMENT_BYTES) + 8


def test_steps_in_flight_do_not_disturb_each_other(start: Start) -> None:
    pipeline = pipeline_of(start)
    first, last = pipeline.workers
    rng = np.random.default_rng(3)
    prompts = [rng.choice(TOKENS, n) for n in (5, 17, 1)]
    through_host = [pipeline.logits_in_chunks(prompt) for prompt in prompts]
    assert connect(first, last, n_slots=3)
    for _ in range(3):
        batches = [
            replace(pipeline.batch([(CachedSequence(), prompt)]), return_logits=True) for prompt in prompts
        ]
        slots = [first.run(batch) for batch in batches]
        assert {hidden.slot for hidden in slots} == {0, 1, 2}
        for batch, hidden, expected in zip(batches, slots, through_host, strict=True):
            np.testing.assert_array_equal(last.run(batch, hidden).logits, expected)


@pytest.mark.parametrize("trouble", ["REFUSE_IPC", "LOSE_PEER_WRITES"])
def test_gpus_that_do_not_reach_each_other_use_host_memory(
    start: Start, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.setenv(f"STANDIN_HIP_{trouble}", "1")
    pipeline = pipeline_of(start)
    assert not connect(*pipeline.workers, n_slots=2)
    assert pipeline.workers[0].call("stats")["sends_by"] == "host memory"
    np.testing.assert_array_equal(pipeline.logits_in_chunks(TOKENS, *CHUNKS), expected)


def test_a_device_that_fails_for_good_ends_its_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_HIP_FAIL_PEER_WRITES", "1")
    pipeline = pipeline_of(start)
    with pytest.raises(EOFError, match=f"has ended, status {EXIT_DEVICE_FAILED}"):
        connect(*pipeline.workers, n_slots=2)


@pytest.mark.parametrize("dead", [0, 1])
def test_after_a_death_handles_are_exchanged_anew(start: Start, expected: np.ndarray, dead: int) -> None:
    pipeline = pipeline_of(start)
    assert connect(*pipeline.workers, n_slots=2)
    survivor = pipeline.workers[1 - dead]
    pipeline.logits_in_chunks(TOKENS[:9])
    mappings = _mappings(survivor)
    pipeline.workers[dead].close()
    pipeline.workers[dead] = start(dead)
    pipeline.workers[dead].load(MODEL, split(2, 2)[dead], LIMITS)
    assert connect(*pipeline.workers, n_slots=2)
    np.testing.assert_array_equal(pipeline.logits_in_chunks(TOKENS, *CHUNKS), expected)
    assert _mappings(survivor) == mappings, "the dead process's inbox must be let go of, and no other made"


def _mappings(process: StageProcess) -> int:
    """Allocations of stand-in GPUs that a process holds or has opened."""
    maps = Path(f"/proc/{process.process.pid}/maps").read_text()
    return sum("memfd:standin-hip " in line for line in maps.splitlines())


@pytest.fixture
def last_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """The second of two stages, in this process."""
    standin.activate(monkeypatch)
    worker = Worker(open_device("hip"))
    worker.load(MODEL, split(2, 2)[1], LIMITS)
    yield worker
    worker.close()


def test_slots_that_are_not_there(last_stage: Worker) -> None:
    with pytest.raises(BatchError, match="slot 0, but this stage has no inbox"):
        last_stage.stage.handoff.take(InSlot(0), 1)
    last_stage.stage.handoff.open_inbox(2)
    for slot in (-1, 2):
        with pytest.raises(BatchError, match=f"slot {slot}: the inbox has 2 slots"):
            last_stage.stage.handoff.take(InSlot(slot), 1)
    with pytest.raises(PoolError, match="has 2 slots, but 3 are wanted"):
        last_stage.stage.handoff.open_inbox(3)


def test_an_inbox_that_cannot_be_opened(last_stage: Worker) -> None:
    handoff = last_stage.stage.handoff
    with pytest.raises(DeviceError, match="hipIpcOpenMemHandle"):
        handoff.connect(handoff.open_inbox(2))  # of the same process
    assert handoff.sends_by == "host memory"
    handoff.disconnect()


def test_an_inbox_without_room(last_stage: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_HIP_FAIL_ALLOCATION", str(standin.count("allocations") + 1))
    with pytest.raises(PoolError, match="allocating 'inbox'"):
        last_stage.stage.handoff.open_inbox(2)


def test_the_cpu_shares_no_memory() -> None:
    with Pipeline(MODEL, 2, limits=LIMITS) as pipeline:
        with pytest.raises(DeviceError, match="shares no memory"):
            pipeline.workers[1].stage.handoff.open_inbox(2)
        with pytest.raises(DeviceError, match="shares no memory"):
            pipeline.workers[0].stage.handoff.connect(InboxOffer(bytes(64), 2, 1 << 20))
        assert pipeline.workers[0].stats().sends_by == "host memory"
