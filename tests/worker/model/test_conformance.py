"""Logits against llama.cpp's, for every file of the conformance kit that this version should run.

The cache is float16, so even float weights do not reach 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.conformance import OWN_KIT, Reference, kit
from support.reference_model import ReferenceModel
from support.stages import CachedSequence, Pipeline, relative_error

from redshard.worker.device.support import CPU_WEIGHT_TYPES


class Case(Reference):
    """A file, its reference, and what the whole model gives for all tokens at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.pipeline = Pipeline(path)
        self.whole = self.pipeline.logits_in_chunks(self.tokens)


@pytest.fixture(scope="module", params=kit(CPU_WEIGHT_TYPES), ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = Case(request.param)
    with case.pipeline:
        yield case


def test_own_part_of_the_kit_is_there() -> None:
    assert {path.stem for path in OWN_KIT.glob("*.gguf")} >= {
        "llama.f16",
        "llama.q4_k",
        "qwen2.q8_0",
        "qwen3.q8_0",
    }


def test_all_at_once(case: Case) -> None:
    case.check(case.whole)


def test_against_a_reference_with_the_same_cache(case: Case) -> None:
    if not case.is_float:
        pytest.skip("quantized matrices read quantized activations")
    reference = ReferenceModel(case.path, cache_dtype=np.float16).logits(case.tokens)
    assert relative_error(case.whole, reference) < 1e-4


def test_token_by_token(case: Case) -> None:
    chunked = case.pipeline.logits_in_chunks(case.tokens, *[1] * len(case.tokens))
    np.testing.assert_array_equal(chunked, case.whole)


@pytest.mark.parametrize("lengths", [(7, 1, 30, 2), (64,), (15, 2, 16, 33)])
def test_uneven_chunks(case: Case, lengths: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(case.pipeline.logits_in_chunks(case.tokens, *lengths), case.whole)


def test_in_a_batch_with_others(case: Case) -> None:
    rng = np.random.default_rng(1)
    n_vocab = case.logits.shape[1]
    ours, other, third = CachedSequence(), CachedSequence(), CachedSequence()
    parts = []
    for chunk in np.split(case.tokens, [40, 41, 42, 90]):
        filler = rng.integers(0, n_vocab, 9)
        pieces = [(other, filler[:3]), (ours, chunk), (third, filler[3:])]
        parts.append(case.pipeline.logits(*pieces)[1])
    np.testing.assert_array_equal(np.concatenate(parts), case.whole)


@pytest.mark.parametrize("n_stages", [2, 3])
def test_several_stages(case: Case, n_stages: int) -> None:
    with Pipeline(case.path, n_stages, seed=n_stages) as pipeline:
        np.testing.assert_array_equal(pipeline.logits_in_chunks(case.tokens, 50, 1, 1), case.whole)
