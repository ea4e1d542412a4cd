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

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.choose import open_device
from redshard.worker.model.step_batch import (
    ADJUSTMENT_CHANGE_DTYPE,
    SAMPLING_ROW_DTYPE,
    TABLE_ENTRY_DTYPE,
    StepBatch,
)
from redshard.worker.model.step_inputs import BatchError
from redshard.worker.worker import Worker

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
    changes = np.zeros(2 * n, ADJUSTMENT_CHANGE_DTYPE)
    changes["slot"], changes["index"] = np.divmod(np.arange(2 * n), 2)
    adjustments = changes["adjustment"]
    adjustments["token"][0::2], adjustments["bias"][0::2] = wanted, 1000.0
    adjustments["token"][1::2], adjustments["bias"][1::2] = (wanted + 1) % N_VOCAB, -1000.0
    sampling = _greedy(n, end_adjustment=2)
    sampling["slot"] = np.arange(n)
    batch = replace(batch, sampling=sampling)
    result = pipeline.run(replace(batch, adjustment_changes=changes))
    np.testing.assert_array_equal(result.tokens, wanted)
    # They stay until they change.
    adjustments["token"][0], wanted[0] = wanted[0] - 1, wanted[0] - 1
    result = pipeline.run(replace(batch, adjustment_changes=changes[:1]))
    np.testing.assert_array_equal(result.tokens, wanted)


def test_tokens_are_looked_up_by_slot(model: Path) -> None:
    """Steps that feed what the step before has sampled, launched before its result is known."""
    prompts = [_prompt(20), _prompt(3, 1)]
    with Pipeline(model) as pipeline:
        sequences = [CachedSequence() for _ in prompts]
        batch = pipeline.batch(list(zip(sequences, prompts, strict=True)))
        ends = np.array([19, 22], np.int32)
        sampling = _greedy(2, repeat_penalty=1.3, count_newest=1)
        sampling["slot"] = [0, 1]
        worker = pipeline.workers[0]
        launched = [worker.stage.launch(replace(batch, output_rows=ends, sampling=sampling))]
        tokens = []
        for _ in range(6):
            batch = pipeline.batch([(sequence, [-1 - slot]) for slot, sequence in enumerate(sequences)])
            launched.append(worker.stage.launch(replace(batch, sampling=sampling)))
            tokens.append(worker.stage.finish(launched.pop(0)).tokens)
        np.testing.assert_array_equal(tokens, _one_by_one(pipeline, prompts, 6))


def _one_by_one(pipeline: Pipeline, prompts: list[np.ndarray], n: int) -> np.ndarray:
    """The same tokens from raw logits, each step fed by hand; only the last token counts as seen."""
    columns = []
    for prompt in prompts:
        sequence, fed, column = CachedSequence(), prompt, []
        for _ in range(n):
            logits = pipeline.logits((sequence, fed))[0][-1]
            if column:
                logits[column[-1]] *= 1 / 1.3 if logits[column[-1]] > 0 else 1.3
            column.append(int(logits.argmax()))
            fed = np.array(column[-1:])
        columns.append(column)
    return np.array(columns).T


def test_a_step_without_outputs(pipeline: Pipeline) -> None:
    prompt = _prompt(30)
    whole = pipeline.logits_in_chunks(prompt)
    sequence = CachedSequence()
    silent = replace(
        pipeline.batch([(sequence, prompt[:20])]),
        output_rows=np.empty(0, np.int32),
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
        hidden = first.stage.run(batch)
        assert isinstance(hidden, np.ndarray)
        assert (hidden.shape, hidden.dtype) == ((5, tiny_config().n_embd), np.float32)
        for wrong in (None, hidden[:4], hidden.astype(np.float64), hidden.T):
            with pytest.raises(BatchError, match="hidden states"):
                last.stage.run(batch, wrong)
        with pytest.raises(BatchError, match="hidden states"):
            first.stage.run(batch, hidden)
        last.stage.run(batch, hidden)


def _with_entry(**changes: int) -> Callable[[StepBatch], StepBatch]:
    entry = np.zeros(1, TABLE_ENTRY_DTYPE)
    for name, value in changes.items():
        entry[name] = value
    return lambda batch: replace(batch, table_entries=np.concatenate([batch.table_entries, entry]))


def _with_change(
    index: int = 0, token: int = 0, slot: int = 0, n: int = 1
) -> Callable[[StepBatch], StepBatch]:
    """An adjustment, and a sampling row that has `n` of them."""
    change = np.zeros(1, ADJUSTMENT_CHANGE_DTYPE)
    change["slot"], change["index"], change["adjustment"]["token"] = slot, index, token
    return lambda batch: replace(batch, adjustment_changes=change, sampling=_greedy(24, end_adjustment=n))


def _with_starts(*starts: int) -> Callable[[StepBatch], StepBatch]:
    return lambda batch: replace(batch, query_starts=np.array(starts, np.int32))


BROKEN: dict[str, tuple[Callable[[StepBatch], StepBatch], str]] = {
    "no tokens": (lambda b: replace(b, token_ids=b.token_ids[:0]), "0 tokens"),
    "too many tokens": (lambda b: replace(b, token_ids=np.zeros(129, np.int32)), "129 tokens"),
    "no sequences": (lambda b: replace(b, slots=b.slots[:0]), "0 sequences"),
    "too many sequences": (lambda b: replace(b, slots=np.arange(9, dtype=np.int32)), "9 sequences"),
    "too few query starts": (lambda b: replace(b, query_starts=b.query_starts[:2]), "query starts"),
    "too many outputs": (lambda b: replace(b, output_rows=np.zeros(129, np.int32)), "129 output rows"),
    "table row out of range": (_with_entry(row=8), "rows of block tables"),
    "table column out of range": (_with_entry(column=16), "columns of block tables"),
    "block out of range": (_with_entry(block=1024), "blocks"),
    "slot out of range": (lambda b: replace(b, slots=b.slots + np.int32(7)), "slots"),
    "too few positions": (lambda b: replace(b, positions=b.positions[1:]), "positions"),
    "token out of range": (lambda b: replace(b, token_ids=b.token_ids + np.int32(N_VOCAB)), "token ids"),
    "negative token": (lambda b: replace(b, token_ids=b.token_ids - np.int32(N_VOCAB)), "token ids"),
    "position out of range": (lambda b: replace(b, positions=b.positions + np.int32(250)), "positions"),
    "negative position": (lambda b: replace(b, positions=b.positions - np.int32(1)), "positions"),
    "gap in positions": (lambda b: replace(b, positions=b.positions // np.int32(2)), "follow one another"),
    "output out of range": (lambda b: replace(b, output_rows=b.output_rows + np.int32(1)), "output_rows"),
    "starts not from 0": (lambda b: replace(b, query_starts=b.query_starts + np.int32(1)), "query starts"),
    "empty sequence": (_with_starts(0, 24, 24), "at least one token"),
    "descending starts": (_with_starts(0, 30, 24), "query starts"),
    "sampling rows missing": (lambda b: replace(b, sampling=b.sampling[:1]), "sampling rows"),
    "too many top tokens": (lambda b: replace(b, n_top=21), "most probable"),
    "sampling slot out of range": (lambda b: replace(b, sampling=_greedy(24, slot=8)), "slots"),
    "adjustments that are not there": (_with_change(n=99), "adjustments"),
    "adjustment of no token": (_with_change(token=N_VOCAB), "adjustments"),
    "adjustment of no slot": (_with_change(slot=8), "slots"),
    "too many adjustments": (_with_change(n=LIMITS.max_adjustments), "adjustments"),
    "adjustment number out of range": (_with_change(index=LIMITS.max_adjustments), "adjustments"),
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


@pytest.mark.parametrize("layer", [0, 2])
def test_weights_that_are_not_finite_give_no_token(tmp_path: Path, layer: int) -> None:
    """Every row that they reach gets token -1; asked to, the stage names the layer."""
    config = tiny_config("qwen3", n_layers=3)
    path = write_model(tmp_path / "model.gguf", config, QuantType.F32)
    with GGUFFile.open(path) as file:
        info = file.tensors[f"blk.{layer}.ffn_down.weight"]
    with path.open("r+b") as raw:
        raw.seek(info.offset)
        raw.write(np.array([np.nan], np.float32).tobytes())
    with Pipeline(path) as pipeline:
        batch = pipeline.batch([(CachedSequence(), _prompt(5))])
        assert set(pipeline.run(replace(batch, sampling=_greedy(5))).tokens.tolist()) == {-1}
    worker = Worker(open_device("cpu", 2), WorkerConfiguration(check_finite=True))
    with Pipeline(path, workers=[worker]) as pipeline:
        batch = pipeline.batch([(CachedSequence(), _prompt(5))])
        with pytest.raises(BatchError, match=f"not finite after layer {layer}, in 5 of 5 rows"):
            pipeline.run(replace(batch, sampling=_greedy(5)))
