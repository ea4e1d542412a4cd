"""Messages between processes give back what went in."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redshard.cluster.pipeline.wire import decode_batch, decode_result, encode_batch, encode_result
from redshard.worker.model.handoff import InSlot
from redshard.worker.model.step_batch import ADJUSTMENT_DTYPE, SAMPLING_ROW_DTYPE, StepBatch, StepResult

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


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 5), counts, counts, counts, st.booleans())
def test_batches(
    seed: int,
    n_tokens: int,
    n_sequences: int,
    n_outputs: int,
    n_sampling: int,
    n_adjustments: int,
    flag: bool,
) -> None:
    rng = np.random.default_rng(seed)
    batch = StepBatch(
        step_id=int(rng.integers(2**62)),
        token_ids=random_array(rng, np.int32, n_tokens),
        positions=random_array(rng, np.int32, n_tokens),
        query_starts=random_array(rng, np.int32, n_sequences + 1),
        block_tables=random_array(rng, np.int32, n_sequences, 3),
        output_rows=random_array(rng, np.int32, n_outputs),
        sampling=random_array(rng, SAMPLING_ROW_DTYPE, n_sampling),
        adjustments=random_array(rng, ADJUSTMENT_DTYPE, n_adjustments),
        n_top=int(rng.integers(20)),
        return_logits=flag,
    )
    decoded, hidden = decode_batch(encode_batch(batch))
    assert_same(decoded, batch)
    assert hidden is None
    assert decoded.sampling.flags.aligned
    for dtype in (np.float32, np.float16):
        given = random_array(rng, dtype, n_tokens, 7)
        decoded, hidden = decode_batch(encode_batch(batch, given))
        assert_same(decoded, batch)
        assert hidden is not None
        assert (hidden.dtype, hidden.shape, hidden.tobytes()) == (dtype, (n_tokens, 7), given.tobytes())
    for slot in (0, n_outputs):
        decoded, hidden = decode_batch(encode_batch(batch, InSlot(slot)))
        assert_same(decoded, batch)
        assert hidden == InSlot(slot)


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
