"""What a stage keeps of its sequences, and how a step's inputs lie in memory."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from redshard.worker.device.arguments import TableChange
from redshard.worker.device.base import HostBuffer
from redshard.worker.model.step_batch import TABLE_ENTRY_DTYPE, StepBatch
from redshard.worker.model.step_inputs import (
    BatchError,
    InputLayout,
    InputStaging,
    SequenceStates,
    StepInputs,
    StepLimits,
)

LIMITS = StepLimits(
    max_tokens=32, max_sequences=4, max_outputs=4, max_context=64, n_kv_blocks=40, block_size=8
)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed of this test's random numbers: {seed}")
    return np.random.default_rng(seed)


def batch_with(entries: list[tuple[int, int, int]], slot: int = 0, position: int = 0) -> StepBatch:
    """A step of one token."""
    return StepBatch(
        step_id=0,
        token_ids=np.zeros(1, np.int32),
        positions=np.array([position], np.int32),
        query_starts=np.array([0, 1], np.int32),
        slots=np.array([slot], np.int32),
        table_entries=np.array(entries, TABLE_ENTRY_DTYPE),
        output_rows=np.empty(0, np.int32),
    )


def test_tokens_find_their_places_in_the_cache(rng: np.random.Generator) -> None:
    states = SequenceStates(LIMITS)
    tables = rng.permutation(40)[:32].reshape(4, 8)
    entries = [(row, column, int(tables[row, column])) for row in range(4) for column in range(8)]
    states.note(batch_with(entries))
    rows, positions = rng.integers(0, 4, 50).astype(np.int32), rng.integers(0, 64, 50).astype(np.int32)
    slots = states.cache_slots(rows, positions)
    assert slots.dtype == np.int32
    np.testing.assert_array_equal(slots, tables[rows, positions // 8] * 8 + positions % 8)


def test_the_device_is_told_what_changed_and_nothing_else() -> None:
    layout = InputLayout(LIMITS)
    array = np.zeros(layout.nbytes, np.uint8)
    staging = InputStaging(layout, HostBuffer(array.ctypes.data, array))
    inputs = StepInputs(LIMITS, n_vocab=10, looks_up=False)

    def changes(batch: StepBatch) -> dict[int, int]:
        nbytes = inputs.pack(batch, staging, samples=False)
        listed = staging.tail[: nbytes - staging.tail_offset].view(np.dtype(TableChange))
        assert staging.step[3] == len(listed)
        return dict(zip(listed["place"].tolist(), listed["block"].tolist(), strict=True))

    assert changes(batch_with([(0, 0, 5), (2, 1, 6)])) == {0: 5, 17: 6}
    assert changes(batch_with([])) == {}
    assert changes(batch_with([(0, 0, 7), (0, 1, 8)])) == {0: 7, 1: 8}
    with pytest.raises(BatchError):  # what a refused step was to change comes with the next one, once
        inputs.pack(batch_with([(3, 7, 9), (1, 0, 3)], position=64), staging, samples=False)
    assert changes(batch_with([(1, 0, 4)])) == {31: 9, 8: 4}
