"""Every tensor type a GGUF file may hold: how many elements a block packs, and into how many bytes.

Source: the ``ggml_type`` enumeration and the block structures of ggml (``ggml.h``, ``ggml-common.h``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum


class QuantType(Enum):
    """One ggml tensor type; the value is (ggml id, elements per block, bytes per block).

    Elements of a block are consecutive in a row, so a row's length is a multiple of `block_elements`.
    """

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q8_1 = (9, 32, 40)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    Q8_K = (15, 256, 292)
    IQ2_XXS = (16, 256, 66)
    IQ2_XS = (17, 256, 74)
    IQ3_XXS = (18, 256, 98)
    IQ1_S = (19, 256, 50)
    IQ4_NL = (20, 32, 18)
    IQ3_S = (21, 256, 110)
    IQ2_S = (22, 256, 82)
    IQ4_XS = (23, 256, 136)
    I8 = (24, 1, 1)
    I16 = (25, 1, 2)
    I32 = (26, 1, 4)
    I64 = (27, 1, 8)
    F64 = (28, 1, 8)
    IQ1_M = (29, 256, 56)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    MXFP4 = (39, 32, 17)
    NVFP4 = (40, 64, 36)
    Q1_0 = (41, 128, 18)
    Q2_0 = (42, 64, 18)

    def __init__(self, ggml_id: int, block_elements: int, block_bytes: int) -> None:
        self.ggml_id = ggml_id
        self.block_elements = block_elements
        self.block_bytes = block_bytes

    @classmethod
    def from_id(cls, ggml_id: int) -> QuantType:
        """The type with this ggml id. Raises ValueError if ggml does not define it or has withdrawn it."""
        try:
            return _BY_ID[ggml_id]
        except KeyError:
            raise ValueError(f"unknown tensor type {ggml_id}") from None

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this type.

        Args:
            shape: numpy order, the row length last; () is a single element.

        Raises:
            ValueError: the row length does not divide into blocks.
        """
        row_length = shape[-1] if shape else 1
        if row_length % self.block_elements:
            raise ValueError(
                f"rows of {row_length} do not divide into {self.name} blocks of {self.block_elements}"
            )
        return math.prod(shape) // self.block_elements * self.block_bytes


_BY_ID = {quant_type.ggml_id: quant_type for quant_type in QuantType}
