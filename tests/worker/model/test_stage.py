"""Steps of a stage: sampling, handoffs, limits, and what a broken batch is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_models import tiny_config, write_model
from support.stages import LIMITS, CachedSequence, Pipeline, relative_error

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.model.step_batch import ADJUSTMENT_DTYPE, SAMPLING_ROW_DTYPE, StepBatch
from redshard.worker.model.step_inputs import BatchError

N_VOCAB = tiny_config().n_vocab


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage") / "model.gguf"
    return write_model(path, tiny_config(n_layers=3), QuantType.Q8_0)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Iterator[Pipeline]:
    with Pipeline(model) as pipeline:
        yield pipeline


def _greedy(n: int, **changes: Any) -> np.ndarray:
    rows = np.zeros(n, SAMPLING_ROW_DTYPE)
    for name, value in {"top_p": 1.0, "repeat_penalty": 1.0, **changes}.items():
        rows[name] = value
    return rows


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _prompt(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).astype(np.int32)


def test_greedy_tokens_and_their_probabilities(pipeline: Pipeline) -> None:
    prompt = _prompt(20)
    logits = pipeline.logits_in_chunks(prompt)
    batch = pipeline.batch([(CachedSequence(), prompt)])
    rows = np.array([3, 19, 7], np.int32)
    result = pipeline.run(replace(batch, output_rows=rows, sampling=_greedy(3), n_top=5))
    expected = _log_softmax(logits[rows])
    assert result.step_id == batch.step_id
    np.testing.assert_array_equal(result.tokens, logits[rows].argmax(axis=1))
    np.testing.assert_allclose(result.logprobs, expected.max(axis=1), atol=1e-5)
    best = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(result.top_tokens, best)
    np.testing.assert_allclose(result.top_logprobs, np.take_along_axis(expected, best, 1), atol=1e-5)


def test_without_most_probable_tokens(pipeline: Pipeline) -> None:
    batch = pipeline.batch([(CachedSequence(), _prompt(4))])
    with_top = pipeline.run(replace(batch, sampling=_greedy(4), n_top=20))
    without = pipeline.run(replace(batch, sampling=_greedy(4)))
    assert with_top.top_tokens.shape == (4, 20)
    assert without.top_tokens.shape == without.top_logprobs.shape == (4, 0)
    np.testing.assert_array_equal(without.tokens, with_top.tokens)
    np.testing.assert_array_equal(without.logprobs, with_top.logprobs)


def test_results_outlive_the_next_step(pipeline: Pipeline) -> None:
    batches = [pipeline.batch([(CachedSequence(), _prompt(6, seed))]) for seed in (0, 9)]
    first, other = (replace(batch, sampling=_greedy(6), n_top=2) for batch in batches)
    result = pipeline.run(first)
    kept = copy.deepcopy(result)
    pipeline.run(other)
    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(result, name), getattr(kept, name))


@pytest.mark.parametrize("n_sequences", [1, 3])
def test_adjustments_reach_their_rows(pipeline: Pipeline, n_sequences: int) -> None:
    """Each row has a bias for a token of its own, wherever the block tables end."""
    batch = pipeline.batch([(CachedSequence(), _prompt(2, seed)) for seed in range(n_sequences)])
    n = 2 * n_sequences
    wanted = np.random.default_rng(5).choice(N_VOCAB, n, replace=False)
    adjustments = np.zeros(2 * n, ADJUSTMENT_DTYPE)
    adjustments["token"][0::2], adjustments["bias"][0::2] = wanted, 1000.0
    adjustments["token"][1::2], adjustments["bias"][1::2] = (wanted + 1) % N_VOCAB, -1000.0
    sampling = _greedy(n)
    sampling["first_adjustment"] = 2 * np.arange(n)
    sampling["end_adjustment"] = 2 * np.arange(n) + 2
    result = pipeline.run(replace(batch, sampling=sampling, adjustments=adjustments))
    np.testing.assert_array_equal(result.tokens, wanted)
    np.testing.assert_array_equal(sampling["first_adjustment"], 2 * np.arange(n))


def test_a_step_without_outputs(pipeline: Pipeline) -> None:
    prompt = _prompt(30)
    whole = pipeline.logits_in_chunks(prompt)
    sequence = CachedSequence()
    silent = replace(
        pipeline.batch([(sequence, prompt[:20])]),
        output_rows=np.empty(0, np.int32),
        adjustments=np.zeros(1, ADJUSTMENT_DTYPE),
    )
    result = pipeline.run(silent)
    assert result.tokens.shape == (0,)
    assert pipeline.run(replace(silent, return_logits=True)).logits.shape == (0, N_VOCAB)
    np.testing.assert_array_equal(pipeline.logits((sequence, prompt[20:]))[0], whole[20:])


def test_the_largest_step(pipeline: Pipeline) -> None:
    lengths = [LIMITS.max_tokens // LIMITS.max_sequences] * LIMITS.max_sequences
    prompts = [_prompt(n, seed) for seed, n in enumerate(lengths)]
    together = pipeline.logits(*((CachedSequence(), prompt) for prompt in prompts))
    for prompt, logits in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(logits, pipeline.logits_in_chunks(prompt))


def test_a_sequence_as_long_as_the_context(model: Path) -> None:
    limits = replace(LIMITS, max_tokens=33, max_sequences=1, max_outputs=33, max_context=97, n_kv_blocks=7)
    prompt = _prompt(97)
    with Pipeline(model) as roomy, Pipeline(model, limits=limits) as tight:
        chunks = [33, 33, 31]
        np.testing.assert_array_equal(tight.logits_in_chunks(prompt, *chunks), roomy.logits_in_chunks(prompt))


def test_float16_handoff(model: Path) -> None:
    prompt = _prompt(40)
    with Pipeline(model) as one, Pipeline(model, 3, handoff="float16") as three:
        exact = one.logits_in_chunks(prompt)
        rounded = three.logits_in_chunks(prompt)
    assert 0 < relative_error(rounded, exact) < 1e-2


def test_hidden_states_between_stages(model: Path) -> None:
    with Pipeline(model, 2) as pipeline:
        first, last = pipeline.workers
        batch = replace(pipeline.batch([(CachedSequence(), _prompt(5))]), return_logits=True)
        hidden = first.run(batch)
        assert isinstance(hidden, np.ndarray)
        assert (hidden.shape, hidden.dtype) == ((5, tiny_config().n_embd), np.float32)
        for wrong in (None, hidden[:4], hidden.astype(np.float64), hidden.T):
            with pytest.raises(BatchError, match="hidden states"):
                last.run(batch, wrong)
        with pytest.raises(BatchError, match="hidden states"):
            first.run(batch, hidden)
        last.run(batch, hidden)


def _without_last_block(batch: StepBatch) -> StepBatch:
    tables = batch.block_tables.copy()
    tables[0, 1] = -1
    return replace(batch, block_tables=tables)


def _with_starts(*starts: int) -> Callable[[StepBatch], StepBatch]:
    return lambda batch: replace(batch, query_starts=np.array(starts, np.int32))


BROKEN: dict[str, tuple[Callable[[StepBatch], StepBatch], str]] = {
    "no tokens": (lambda b: replace(b, token_ids=b.token_ids[:0]), "0 tokens"),
    "too many tokens": (lambda b: replace(b, token_ids=np.zeros(129, np.int32)), "129 tokens"),
    "no sequences": (lambda b: replace(b, query_starts=b.query_starts[:1]), "0 sequences"),
    "too many sequences": (
        lambda b: replace(b, query_starts=np.arange(10, dtype=np.int32)),
        "9 sequences",
    ),
    "too many outputs": (lambda b: replace(b, output_rows=np.zeros(129, np.int32)), "129 output rows"),
    "too wide tables": (lambda b: replace(b, block_tables=np.zeros((2, 17), np.int32)), "17 columns"),
    "no tables": (lambda b: replace(b, block_tables=np.zeros((2, 0), np.int32)), "0 columns"),
    "too few tables": (lambda b: replace(b, block_tables=b.block_tables[:1]), "rows of block_tables"),
    "too few positions": (lambda b: replace(b, positions=b.positions[1:]), "positions"),
    "token out of range": (lambda b: replace(b, token_ids=b.token_ids + np.int32(N_VOCAB)), "token_ids"),
    "negative token": (lambda b: replace(b, token_ids=b.token_ids - np.int32(N_VOCAB)), "token_ids"),
    "position out of range": (lambda b: replace(b, positions=b.positions + np.int32(250)), "positions"),
    "negative position": (lambda b: replace(b, positions=b.positions - np.int32(1)), "positions"),
    "gap in positions": (lambda b: replace(b, positions=b.positions // np.int32(2)), "follow one another"),
    "output out of range": (lambda b: replace(b, output_rows=b.output_rows + np.int32(1)), "output_rows"),
    "starts not from 0": (lambda b: replace(b, query_starts=b.query_starts + np.int32(1)), "query starts"),
    "empty sequence": (_with_starts(0, 24, 24), "at least one token"),
    "descending starts": (_with_starts(0, 30, 24), "query starts"),
    "block out of range": (lambda b: replace(b, block_tables=b.block_tables + np.int32(1024)), "blocks"),
    "block missing": (_without_last_block, "block"),
    "wrong type": (lambda b: replace(b, token_ids=b.token_ids.astype(np.int64)), "int32"),
    "wrong dimensions": (lambda b: replace(b, block_tables=b.block_tables[0]), "dimensions"),
    "sampling rows missing": (lambda b: replace(b, sampling=b.sampling[:1]), "sampling rows"),
    "too many top tokens": (lambda b: replace(b, n_top=21), "most probable"),
    "adjustments out of range": (
        lambda b: replace(
            b, adjustments=np.zeros(1, ADJUSTMENT_DTYPE), sampling=_greedy(24, end_adjustment=2)
        ),
        "adjustments",
    ),
    "adjustment of no token": (
        lambda b: replace(b, adjustments=np.array([(N_VOCAB, 0, 0, 0.0)], ADJUSTMENT_DTYPE)),
        "adjustments",
    ),
    "too many adjustments": (
        lambda b: replace(b, adjustments=np.zeros(LIMITS.max_adjustments + 1, ADJUSTMENT_DTYPE)),
        "adjustments",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_batches_are_refused(pipeline: Pipeline, name: str) -> None:
    spoil, message = BROKEN[name]
    sound = pipeline.batch([(CachedSequence(), _prompt(20)), (CachedSequence(), _prompt(4, 1))])
    sound = replace(sound, sampling=_greedy(24))
    with pytest.raises(BatchError, match=message):
        pipeline.run(spoil(sound))
    pipeline.run(sound)


@pytest.mark.parametrize("name", list(asdict(LIMITS)))
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        replace(LIMITS, **{name: 0})
