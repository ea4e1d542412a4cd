"""The table of block formats against the one in the gguf package."""

from __future__ import annotations

import pickle

import gguf
import pytest

from redshard.loader.gguf.quant_types import QuantType


def test_table_agrees_with_the_gguf_package() -> None:
    for gguf_type, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        ours = QuantType.from_id(gguf_type.value)
        assert (ours.name, ours.ggml_id) == (gguf_type.name, gguf_type.value)
        assert (ours.block_elements, ours.block_bytes) == (elements, nbytes)


def test_sizes() -> None:
    assert QuantType.Q4_K.nbytes((3, 512)) == 3 * 2 * 144
    assert QuantType.F16.nbytes((7,)) == 14
    assert QuantType.F32.nbytes(()) == 4
    assert QuantType.Q8_0.nbytes((2, 3, 64)) == 2 * 3 * 2 * 34


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rows of 100 do not divide into Q4_0 blocks of 32"):
        QuantType.Q4_0.nbytes((32, 100))
    for removed in (4, 5, 31, 36, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"unknown tensor type {removed}"):
            QuantType.from_id(removed)


def test_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(QuantType.Q6_K)) is QuantType.Q6_K
