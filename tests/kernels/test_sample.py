"""`sample` against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import native_ops, reference_ops
from support.reference_ops import Sampling

import redshard._cpu as _cpu

N_VOCABS = [1, 2, 17, 4095, 4096, 4097, 151_936]


def random_logits(rng: np.random.Generator, n: int, n_vocab: int, spread: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((n, n_vocab)) * spread).astype(np.float32)


def draws(row: dict[str, float], n: int) -> list[Sampling]:
    return [Sampling(seed=1234567890123456789, draw=draw, **row) for draw in range(n)]  # type: ignore[arg-type]


@pytest.mark.parametrize("n_vocab", N_VOCABS)
@pytest.mark.parametrize("n", [1, 5])
def test_greedy_and_logprobs(runtime: _cpu.Runtime, rng: np.random.Generator, n_vocab: int, n: int) -> None:
    logits = random_logits(rng, n, n_vocab)
    out = native_ops.sample(runtime, logits, [Sampling()] * n, n_top=min(5, n_vocab))
    np.testing.assert_array_equal(out.tokens, logits.argmax(axis=1))
    for row in range(n):
        expected = reference_ops.logprobs(logits[row])
        np.testing.assert_allclose(out.logprobs[row], expected[out.tokens[row]], rtol=2e-6, atol=2e-6)
        best = np.argsort(-logits[row], kind="stable")[: out.top_tokens.shape[1]]
        np.testing.assert_array_equal(out.top_tokens[row], best)
        np.testing.assert_allclose(out.top_logprobs[row], expected[best], rtol=2e-6, atol=2e-6)


def test_ties_go_to_the_lowest_id(runtime: _cpu.Runtime) -> None:
    logits = np.zeros((2, 10_000), np.float32)
    logits[1, [4097, 9000]] = 5
    out = native_ops.sample(runtime, logits, [Sampling(), Sampling()], n_top=3)
    np.testing.assert_array_equal(out.tokens, [0, 4097])
    np.testing.assert_array_equal(out.top_tokens, [[0, 1, 2], [4097, 9000, 0]])


def test_more_top_tokens_wanted_than_there_are(runtime: _cpu.Runtime) -> None:
    out = native_ops.sample(runtime, np.array([[1.0, 2.0]], np.float32), [Sampling()], n_top=4)
    np.testing.assert_array_equal(out.top_tokens, [[1, 0, -1, -1]])
    assert (out.top_logprobs[0, 2:] == -np.inf).all()


FILTERS = {
    "temperature": {"temperature": 0.75},
    "hot": {"temperature": 4.0},
    "cold": {"temperature": 1e-30},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k_1": {"temperature": 1.0, "top_k": 1},
    "top_k_beyond": {"temperature": 1.0, "top_k": 10**9},
    "top_p": {"temperature": 1.0, "top_p": 0.75},
    "top_p_0": {"temperature": 1.0, "top_p": 0.0},
    "min_p": {"temperature": 1.5, "min_p": 0.125},
    "min_p_1": {"temperature": 1.0, "min_p": 1.0},
    "all": {"temperature": 0.75, "top_k": 40, "top_p": 0.9375, "min_p": 0.015625},
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("n_vocab", "spread"), [(3, 1.0), (500, 2.0), (9000, 0.1), (9000, 8.0)])
def test_draws_are_the_reference_draws(
    runtime: _cpu.Runtime, rng: np.random.Generator, name: str, n_vocab: int, spread: float
) -> None:
    n = 8
    logits = random_logits(rng, n, n_vocab, spread)
    rows = draws(FILTERS[name], n)
    out = native_ops.sample(runtime, logits, rows)
    for row, sampling in enumerate(rows):
        assert_drawn(int(out.tokens[row]), logits[row], sampling)
        expected = reference_ops.logprobs(logits[row])[out.tokens[row]]
        np.testing.assert_allclose(out.logprobs[row], expected, rtol=3e-6, atol=3e-6)


def assert_drawn(token: int, logits: np.ndarray, sampling: Sampling) -> None:
    """The token is the reference's; or rounding moved a limit that the random number or a filter hits."""
    if token == reference_ops.sample(logits, sampling):
        return
    probabilities = reference_ops.distribution(reference_ops.adjust(logits, sampling), sampling)
    cumulated = np.cumsum(probabilities)
    random = reference_ops.uniform(sampling.seed, sampling.draw)
    assert cumulated[token] - probabilities[token] - 1e-4 <= random <= cumulated[token] + 1e-4


def test_frequencies_follow_the_distribution(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    n = 20_000
    row = random_logits(rng, 1, 12, 1.0)
    sampling = {"temperature": 0.75, "top_k": 8}
    tokens = native_ops.sample(runtime, np.repeat(row, n, axis=0), draws(sampling, n)).tokens
    expected = reference_ops.distribution(row[0], Sampling(**sampling))  # type: ignore[arg-type]
    counts = np.bincount(tokens, minlength=12)
    deviation = np.sqrt(n * expected * (1 - expected)) + 1e-9
    assert (np.abs(counts - n * expected) <= 5.5 * deviation).all()
    assert (counts[expected == 0] == 0).all()


def test_seed_and_draw_fix_the_token_in_any_batch(
    every_runtime: list[_cpu.Runtime], rng: np.random.Generator
) -> None:
    n, n_vocab = 9, 20_000
    logits = random_logits(rng, n, n_vocab)
    rows = [
        Sampling(seed=int(seed), draw=i, temperature=1.0, top_p=top_p)
        for i, (seed, top_p) in enumerate(zip(rng.integers(2**63, size=n), [1.0, 0.5, 0.9] * 3, strict=True))
    ]
    for runtime in every_runtime:
        together = native_ops.sample(runtime, logits, rows, n_top=2)
        order = rng.permutation(n)
        shuffled = native_ops.sample(runtime, logits[order], [rows[i] for i in order], n_top=2)
        for name in ("tokens", "logprobs", "top_tokens", "top_logprobs"):
            np.testing.assert_array_equal(getattr(shuffled, name), getattr(together, name)[order])
        for i in range(n):
            alone = native_ops.sample(runtime, logits[i : i + 1], rows[i : i + 1])
            assert alone.tokens[0] == together.tokens[i]
            assert alone.logprobs[0] == together.logprobs[i]


def test_penalties_and_bias(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    n, n_vocab = 30, 6000
    logits = random_logits(rng, n, n_vocab, 1.0)
    rows = []
    for row in range(n):
        tokens = np.concatenate([np.argsort(-logits[row])[:3], rng.choice(n_vocab, 20)])
        tokens = np.unique(tokens)
        rows.append(
            Sampling(
                seed=row,
                temperature=float(row % 2),
                top_k=50,
                repeat_penalty=1.25,
                presence_penalty=0.5,
                frequency_penalty=0.25,
                adjustments=[
                    (int(token), int(rng.integers(0, 3)), int(rng.integers(0, 3)), float(rng.normal()))
                    for token in tokens
                ],
                # Sometimes among the adjustments, sometimes not.
                newest=[None, int(tokens[0]), int(logits[row].argmax()), int(rng.integers(n_vocab))][row % 4],
            )
        )
    out = native_ops.sample(runtime, logits, rows)
    for row, sampling in enumerate(rows):
        assert_drawn(int(out.tokens[row]), logits[row], sampling)
        if sampling.temperature == 0:
            assert out.tokens[row] == reference_ops.adjust(logits[row], sampling).argmax()
        raw = reference_ops.logprobs(logits[row])  # log probabilities are those of the model
        np.testing.assert_allclose(out.logprobs[row], raw[out.tokens[row]], rtol=3e-6, atol=3e-6)


def test_adjustments_outside_the_vocabulary_are_ignored(runtime: _cpu.Runtime) -> None:
    row = Sampling(adjustments=[(-1, 1, 1, 100.0), (3, 1, 1, 100.0)])
    assert native_ops.sample(runtime, np.array([[1, 3, 2]], np.float32), [row]).tokens[0] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0, np.nan])
@pytest.mark.parametrize("top_p", [1.0, 0.9, np.nan])
def test_logits_that_are_not_finite(runtime: _cpu.Runtime, temperature: float, top_p: float) -> None:
    n_vocab = 5000
    logits = np.full((5, n_vocab), -1.0, np.float32)
    logits[0] = np.nan
    logits[1] = -np.inf
    logits[2, [3, 4500]] = np.inf
    logits[3, ::2] = np.nan
    logits[3, 4999] = 50
    logits[4] = -np.inf
    logits[4, 4444] = -3
    rows = [Sampling(temperature=temperature, top_p=top_p, top_k=top_k) for top_k in (0, 0, 5, 5, 0)]
    out = native_ops.sample(runtime, logits, rows, n_top=2)
    np.testing.assert_array_equal(out.tokens, [-1, -1, -1, 4999, 4444])
    assert np.isnan(out.logprobs[:3]).all()
    np.testing.assert_allclose(out.logprobs[3:], 0, atol=1e-6)
    np.testing.assert_array_equal(out.top_tokens[3], [4999, 1])
    assert out.top_tokens[0, 0] == -1


@given(
    logits=st.lists(st.floats(width=32), min_size=1, max_size=40),
    temperature=st.floats(width=32),
    top_k=st.integers(-(2**31), 2**31 - 1),
    top_p=st.floats(width=32),
    min_p=st.floats(width=32),
    penalties=st.tuples(st.floats(width=32), st.floats(width=32), st.floats(width=32)),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=300, deadline=None)
def test_any_input_gives_a_token(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: tuple[float, float, float],
    seed: int,
) -> None:
    row = Sampling(seed, 0, temperature, top_k, top_p, min_p, *penalties, adjustments=[(0, 1, 1, 0.0)])
    runtime = _cpu.Runtime(1)
    out = native_ops.sample(runtime, np.array([logits], np.float32), [row], n_top=3)
    if np.isfinite(np.nan_to_num(np.float32(logits), nan=-np.inf, posinf=np.inf, neginf=-np.inf).max()):
        assert 0 <= out.tokens[0] < len(logits)
    else:
        assert out.tokens[0] == -1
