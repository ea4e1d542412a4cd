"""Argument blocks of the device kernels, by the names of their structures in ``kernels/common/arguments.h``.

Fields and limits stand in that header alone. Pointers are device addresses (plain integers, 0 for null).
"""

from __future__ import annotations

import ctypes

from redshard.worker.device.sources import constants, declared_in

_HEADER = "common/arguments.h"
_CONSTANTS = constants(_HEADER)

MAX_MATRICES = _CONSTANTS["MAX_MATRICES"]
MAX_TOP_LOGPROBS = _CONSTANTS["MAX_TOP_LOGPROBS"]
#: Positions of a context that attention takes at a time.
PARTITION = _CONSTANTS["PARTITION"]
#: Elements of a block of an activation's quants.
QUANT_BLOCK = _CONSTANTS["QUANT_BLOCK"]


@declared_in(_HEADER)
class Step(ctypes.Structure):
    """Row counts of one step; lives in device memory."""


@declared_in(_HEADER)
class Activation(ctypes.Structure):
    """Rows as float32, as 8-bit blocks of 32, or both."""


@declared_in(_HEADER)
class Matrix(ctypes.Structure):
    """A weight matrix in its GGUF blocks, with an optional float32 bias of n_rows."""


@declared_in(_HEADER)
class TableChange(ctypes.Structure):
    """One entry of the block tables and its new value."""


@declared_in(_HEADER)
class SetTablesArguments(ctypes.Structure):
    """``set_tables``: entries of the block tables."""


@declared_in(_HEADER)
class EmbedArguments(ctypes.Structure):
    """``embed``: rows of the token table as float32."""


@declared_in(_HEADER)
class RmsNormArguments(ctypes.Structure):
    """``rms_norm``: normalized rows, of all tokens or of the output rows."""


@declared_in(_HEADER)
class MatmulArguments(ctypes.Structure):
    """``matmul``: one activation times up to three matrices."""


@declared_in(_HEADER)
class SwigluArguments(ctypes.Structure):
    """``swiglu``: silu(x gate^T) * (x up^T)."""


@declared_in(_HEADER)
class RopeStoreArguments(ctypes.Structure):
    """``rope_store``: head norms, rotary embedding, keys and values into the cache."""


@declared_in(_HEADER)
class AttentionArguments(ctypes.Structure):
    """``attention``: causal attention over the paged cache."""


@declared_in(_HEADER)
class SamplingRow(ctypes.Structure):
    """How one output row is sampled."""


@declared_in(_HEADER)
class Adjustment(ctypes.Structure):
    """One token whose logit a row changes: counts for the penalties and a bias."""


@declared_in(_HEADER)
class SampleArguments(ctypes.Structure):
    """``sample``: one token id a row, with log probabilities."""


@declared_in(_HEADER)
class CopyArguments(ctypes.Structure):
    """``copy`` of the CPU device: bytes from one address to another."""


@declared_in(_HEADER)
class FillArguments(ctypes.Structure):
    """``fill`` of the CPU device: bytes of one value."""


#: Kernel name -> its argument block. A device's kernel set offers exactly these operations.
KERNEL_ARGUMENTS: dict[str, type[ctypes.Structure]] = {
    "set_tables": SetTablesArguments,
    "embed": EmbedArguments,
    "rms_norm": RmsNormArguments,
    "matmul": MatmulArguments,
    "swiglu": SwigluArguments,
    "rope_store": RopeStoreArguments,
    "attention": AttentionArguments,
    "sample": SampleArguments,
}
