"""The operations a model is made of: each function fills one argument block and launches it.

Addresses are device addresses; `rows` bounds the rows a step may have, the kernels read the true counts from
the step's inputs. Shapes stand in ``kernels/common/arguments.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import (
    MAX_MATRICES,
    QUANT_BLOCK,
    Activation,
    AttentionArguments,
    EmbedArguments,
    MatmulArguments,
    Matrix,
    RmsNormArguments,
    RopeStoreArguments,
    SampleArguments,
    SetTablesArguments,
    SwigluArguments,
)
from redshard.worker.device.base import Device
from redshard.worker.model.sampler import SampleAddresses
from redshard.worker.model.step_inputs import InputAddresses

_FLOAT_TYPES = frozenset({QuantType.F32.ggml_id, QuantType.F16.ggml_id, QuantType.BF16.ggml_id})


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention and its cache look like, the same in every layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    block_size: int
    table_width: int
    max_sequences: int


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embedding: its table (positions, n_rot / 2, 2), and how the elements of a head pair up."""

    table: int
    n_rot: int
    neox: bool


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Addresses of one layer's keys and values, and of the block tables that find them."""

    keys: int
    values: int
    tables: int


def activation(take: Callable[[int], int], rows: int, width: int, readers: Iterable[Matrix]) -> Activation:
    """Room for an activation in the forms its readers want: float32 for float matrices, else quants.

    Args:
        take: gives the device address of so many bytes.
        rows: of the activation.
        width: elements of a row.
        readers: the matrices it will be multiplied with.
    """
    is_float = [matrix.type in _FLOAT_TYPES for matrix in readers]
    result = Activation()
    if any(is_float):
        result.values = take(4 * rows * width)
    if not all(is_float):
        blocks = rows * width // QUANT_BLOCK
        result.quants = take(rows * width)
        result.scales = take(4 * blocks)
        result.sums = take(4 * blocks)
    return result


def read_by(x: Activation, readers: Iterable[Matrix]) -> Activation:
    """The activation with only those forms that these matrices read."""
    is_float = [matrix.type in _FLOAT_TYPES for matrix in readers]
    result = Activation()
    if any(is_float):
        result.values = x.values
    if not all(is_float):
        result.quants, result.scales, result.sums = x.quants, x.scales, x.sums
    return result


def set_tables(device: Device, inputs: InputAddresses, tables: int) -> None:
    """The step's changes of the block tables, int32 (slots, table_width)."""
    arguments = SetTablesArguments(step=inputs.step, changes=inputs.table_changes, tables=tables)
    device.launch("set_tables", arguments, rows=1)


def embed(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    table: Matrix,
    out: int,
    *,
    newest: int | None,
    width: int,
    scale: float = 1.0,
) -> None:
    """Token embeddings, times `scale`, as float32 rows; `newest`: the token sampled last in each slot."""
    arguments = EmbedArguments(
        step=inputs.step,
        token_ids=inputs.token_ids,
        newest=newest,
        table=table,
        out=out,
        width=width,
        scale=scale,
    )
    device.launch("embed", arguments, rows)


def rms_norm(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    x: int,
    weight: int,
    out: Activation,
    *,
    width: int,
    eps: float,
    over_outputs: bool = False,
) -> None:
    """Root mean square norm (https://arxiv.org/abs/1910.07467) of all tokens' rows, or of the output rows."""
    arguments = RmsNormArguments(
        step=inputs.step,
        x=x,
        rows=inputs.output_rows if over_outputs else None,
        weight=weight,
        out=out,
        width=width,
        eps=eps,
    )
    device.launch("rms_norm", arguments, rows)


def matmul(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    x: Activation,
    products: Sequence[tuple[Matrix, int]],
    *,
    width: int,
    accumulate: bool = False,
    over_outputs: bool = False,
) -> None:
    """One activation times up to three matrices, each product into (or onto) float32 rows at its address."""
    if not 1 <= len(products) <= MAX_MATRICES:
        raise ValueError(f"a launch multiplies with 1 to {MAX_MATRICES} matrices, not {len(products)}")
    arguments = MatmulArguments(
        step=inputs.step,
        x=x,
        w=tuple(matrix for matrix, _ in products),
        y=tuple(address for _, address in products),
        n_matrices=len(products),
        width=width,
        accumulate=accumulate,
        over_outputs=over_outputs,
    )
    device.launch("matmul", arguments, rows)


def swiglu(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    x: Activation,
    gate: Matrix,
    up: Matrix,
    out: Activation,
    *,
    width: int,
) -> None:
    """Gated feed-forward, silu(x gate^T) * (x up^T) (https://arxiv.org/abs/2002.05202)."""
    arguments = SwigluArguments(step=inputs.step, x=x, gate=gate, up=up, out=out, width=width)
    device.launch("swiglu", arguments, rows)


def rope_store(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    qkv: tuple[int, int, int],
    cache: LayerCache,
    shape: AttentionShape,
    rotary: Rotary,
    *,
    q_norm: int | None,
    k_norm: int | None,
    eps: float,
) -> None:
    """Head norms if any, rotary embedding (https://arxiv.org/abs/2104.09864), k and v to the cache."""
    q, k, v = qkv
    arguments = RopeStoreArguments(
        step=inputs.step,
        positions=inputs.positions,
        slots=inputs.slots,
        q=q,
        k=k,
        v=v,
        q_norm=q_norm,
        k_norm=k_norm,
        rotary=rotary.table,
        k_cache=cache.keys,
        v_cache=cache.values,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        n_rot=rotary.n_rot,
        neox=rotary.neox,
        block_size=shape.block_size,
        eps=eps,
    )
    device.launch("rope_store", arguments, rows)


def attention(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    q: int,
    cache: LayerCache,
    shape: AttentionShape,
    out: Activation,
    *,
    scratch: int,
    scratch_bytes: int,
) -> None:
    """Causal attention over the paged cache, logits scaled by head_dim ** -0.5."""
    arguments = AttentionArguments(
        step=inputs.step,
        positions=inputs.positions,
        sequences=inputs.sequences,
        query_starts=inputs.query_starts,
        table_rows=inputs.table_rows,
        first_partitions=inputs.first_partitions,
        block_tables=cache.tables,
        q=q,
        k_cache=cache.keys,
        v_cache=cache.values,
        out=out,
        scratch=scratch,
        scratch_bytes=scratch_bytes,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        block_size=shape.block_size,
        table_width=shape.table_width,
        scale=shape.head_dim**-0.5,
        max_sequences=shape.max_sequences,
    )
    device.launch("attention", arguments, rows)


def sample(
    device: Device,
    inputs: InputAddresses,
    rows: int,
    logits: int,
    out: SampleAddresses,
    *,
    newest: int,
    n_vocab: int,
    n_top: int,
) -> None:
    """One token for every output row, noted in `newest` by slot too."""
    arguments = SampleArguments(
        step=inputs.step,
        logits=logits,
        rows=inputs.sampling,
        adjustments=inputs.adjustments,
        newest=newest,
        tokens=out.tokens,
        logprobs=out.logprobs,
        top_tokens=out.top_tokens,
        top_logprobs=out.top_logprobs,
        n_vocab=n_vocab,
        n_top=n_top,
    )
    device.launch("sample", arguments, rows)
