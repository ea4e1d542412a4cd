"""Argument blocks of the device kernels: the fields of ``kernels/common/arguments.h``, as ctypes structures.

Pointers are device addresses (plain integers, 0 for null). A test compares both layouts field by field.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p

MAX_MATRICES = 3
MAX_TOP_LOGPROBS = 20
PARTITION = 128


class Step(ctypes.Structure):
    """Row counts of one step; lives in device memory."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("n_sequences", c_int32),
        ("n_outputs", c_int32),
        ("n_changes", c_int32),
    ]


class Activation(ctypes.Structure):
    """Rows as float32, as 8-bit blocks of 32, or both."""

    _fields_ = [("values", c_void_p), ("quants", c_void_p), ("scales", c_void_p), ("sums", c_void_p)]


class Matrix(ctypes.Structure):
    """A weight matrix in its GGUF blocks, with an optional float32 bias of n_rows."""

    _fields_ = [("data", c_void_p), ("bias", c_void_p), ("type", c_int32), ("n_rows", c_int32)]


class TableChange(ctypes.Structure):
    """One entry of the block tables and its new value."""

    _fields_ = [("place", c_int32), ("block", c_int32)]


class SetTablesArguments(ctypes.Structure):
    """``set_tables``: entries of the block tables."""

    _fields_ = [("step", c_void_p), ("changes", c_void_p), ("tables", c_void_p)]


class EmbedArguments(ctypes.Structure):
    """``embed``: rows of the token table as float32."""

    _fields_ = [
        ("step", c_void_p),
        ("token_ids", c_void_p),
        ("newest", c_void_p),
        ("table", Matrix),
        ("out", c_void_p),
        ("width", c_int32),
        ("scale", c_float),
    ]


class RmsNormArguments(ctypes.Structure):
    """``rms_norm``: normalized rows, of all tokens or of the output rows."""

    _fields_ = [
        ("step", c_void_p),
        ("x", c_void_p),
        ("rows", c_void_p),
        ("weight", c_void_p),
        ("out", Activation),
        ("width", c_int32),
        ("eps", c_float),
    ]


class MatmulArguments(ctypes.Structure):
    """``matmul``: one activation times up to three matrices."""

    _fields_ = [
        ("step", c_void_p),
        ("x", Activation),
        ("w", Matrix * MAX_MATRICES),
        ("y", c_void_p * MAX_MATRICES),
        ("n_matrices", c_int32),
        ("width", c_int32),
        ("accumulate", c_int32),
        ("over_outputs", c_int32),
    ]


class SwigluArguments(ctypes.Structure):
    """``swiglu``: silu(x gate^T) * (x up^T)."""

    _fields_ = [
        ("step", c_void_p),
        ("x", Activation),
        ("gate", Matrix),
        ("up", Matrix),
        ("out", Activation),
        ("width", c_int32),
        ("reserved", c_int32),
    ]


class RopeStoreArguments(ctypes.Structure):
    """``rope_store``: head norms, rotary embedding, keys and values into the cache."""

    _fields_ = [
        ("step", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rotary", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("n_heads", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("value_dim", c_int32),
        ("n_rot", c_int32),
        ("neox", c_int32),
        ("block_size", c_int32),
        ("eps", c_float),
    ]


class AttentionArguments(ctypes.Structure):
    """``attention``: causal attention over the paged cache."""

    _fields_ = [
        ("step", c_void_p),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("query_starts", c_void_p),
        ("table_rows", c_void_p),
        ("first_partitions", c_void_p),
        ("block_tables", c_void_p),
        ("q", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("out", Activation),
        ("scratch", c_void_p),
        ("scratch_bytes", c_int64),
        ("n_heads", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("value_dim", c_int32),
        ("block_size", c_int32),
        ("table_width", c_int32),
        ("scale", c_float),
        ("max_sequences", c_int32),
        ("splits", c_int32),
        ("reserved", c_int32),
    ]


class SamplingRow(ctypes.Structure):
    """How one output row is sampled."""

    _fields_ = [
        ("seed", c_uint64),
        ("draw", c_int32),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repeat_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("first_adjustment", c_int32),
        ("end_adjustment", c_int32),
        ("slot", c_int32),
        ("count_newest", c_int32),
    ]


class Adjustment(ctypes.Structure):
    """One token whose logit a row changes: counts for the penalties and a bias."""

    _fields_ = [("token", c_int32), ("seen", c_int32), ("generated", c_int32), ("bias", c_float)]


class SampleArguments(ctypes.Structure):
    """``sample``: one token id a row, with log probabilities."""

    _fields_ = [
        ("step", c_void_p),
        ("logits", c_void_p),
        ("rows", c_void_p),
        ("adjustments", c_void_p),
        ("newest", c_void_p),
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("top_tokens", c_void_p),
        ("top_logprobs", c_void_p),
        ("n_vocab", c_int32),
        ("n_top", c_int32),
    ]


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
