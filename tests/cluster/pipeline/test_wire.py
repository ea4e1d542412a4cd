"""Messages between processes give back what went in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redshard.cluster.pipeline.wire import (
    decode_batch,
    decode_hidden,
    decode_result,
    encode_batch,
    encode_hidden,
    encode_result,
)
from redshard.worker.model.handoff import InSlot
from redshard.worker.model.step_batch import (
    ADJUSTMENT_CHANGE_DTYPE,
    SAMPLING_ROW_DTYPE,
    TABLE_ENTRY_DTYPE,
    StepBatch,
    StepResult,
)

counts = st.integers(0, 5)


def random_array(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    """Random bytes of this type."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(nbytes), dtype).reshape(shape)


def assert_same(left: Any, right: Any) -> None:
    """Equal in every field, with shape, type and bits."""
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        else:
            assert a == b, field.name


@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 5), counts, counts, counts, counts, st.booleans()
)
def test_batches(
    seed: int,
    n_tokens: int,
    n_sequences: int,
    n_outputs: int,
    n_sampling: int,
    n_changes: int,
    n_entries: int,
    flag: bool,
) -> None:
    rng = np.random.default_rng(seed)
    batch = StepBatch(
        step_id=int(rng.integers(2**62)),
        token_ids=random_array(rng, np.int32, n_tokens),
        positions=random_array(rng, np.int32, n_tokens),
        query_starts=random_array(rng, np.int32, n_sequences + 1),
        slots=random_array(rng, np.int32, n_sequences),
        table_entries=random_array(rng, TABLE_ENTRY_DTYPE, n_entries),
        output_rows=random_array(rng, np.int32, n_outputs),
        sampling=random_array(rng, SAMPLING_ROW_DTYPE, n_sampling),
        adjustment_changes=random_array(rng, ADJUSTMENT_CHANGE_DTYPE, n_changes),
        n_top=int(rng.integers(20)),
        return_logits=flag,
    )
    decoded = decode_batch(encode_batch(batch))
    assert_same(decoded, batch)
    assert decoded.sampling.flags.aligned


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_hidden_states(dtype: type) -> None:
    given = random_array(np.random.default_rng(), dtype, 5, 7)
    hidden = decode_hidden(encode_hidden(given))
    assert isinstance(hidden, np.ndarray)
    assert (hidden.dtype, hidden.shape, hidden.tobytes()) == (dtype, (5, 7), given.tobytes())
    assert decode_hidden(encode_hidden(InSlot(3))) == InSlot(3)


@pytest.mark.parametrize(("n", "n_top", "n_logits"), [(0, 0, 0), (3, 0, 0), (4, 5, 0), (0, 0, 6)])
def test_results(n: int, n_top: int, n_logits: int) -> None:
    rng = np.random.default_rng(n + n_top + n_logits)
    result = StepResult(
        step_id=7,
        tokens=random_array(rng, np.int32, n),
        logprobs=random_array(rng, np.float32, n),
        top_tokens=random_array(rng, np.int32, n, n_top),
        top_logprobs=random_array(rng, np.float32, n, n_top),
        logits=random_array(rng, np.float32, n_logits, 11) if n_logits else None,
    )
    assert_same(decode_result(encode_result(result)), result)
