"""What a block is, what it is built on, and the launches that blocks share.

A block is built once for a stage: it looks its weights up by role and takes its activations from the arena.
Launching it is recorded; `rows` bounds the rows a step may have, the kernels read the true counts from the
step's inputs. Addresses are device addresses, shapes stand in ``kernels/common/arguments.h``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.configuration import AttentionConfig, RopeConfig
from redshard.worker.device.arguments import (
    MAX_MATRICES,
    QUANT_BLOCK,
    Activation,
    MatmulArguments,
    Matrix,
    RmsNormArguments,
)
from redshard.worker.device.base import Device
from redshard.worker.model.arena import Arena
from redshard.worker.model.step_inputs import InputAddresses, StepLimits
from redshard.worker.model.weights import StageWeights

#: Type of a matrix that is not known yet.
UNKNOWN_TYPE = -1
_FLOAT_TYPES = frozenset({QuantType.F32.ggml_id, QuantType.F16.ggml_id, QuantType.BF16.ggml_id})


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Addresses of one layer's keys and values, and of the block tables that find them."""

    keys: int
    values: int
    tables: int


@dataclass(slots=True)
class Site:
    """What the blocks of a stage are built on.

    Attributes:
        weights: of the stage, with the configuration of its model.
        limits: the largest step.
        inputs: addresses of a step's inputs.
        arena: of activations. Blocks run one after the other, so each takes its own within a phase.
        caches: of the layers that keep something, by their numbers in the model.
        rotary: tables of cosines and sines, float32 (max_context, n_rot / 2, 2).
        newest: the token sampled last in each slot, int32 (max_sequences,); None where no tokens are sampled.
        scratch_bytes: what the device's attention wants besides its inputs and outputs.
        hidden: the residual stream, float32 (max_tokens, n_embd); the first in the arena.
    """

    weights: StageWeights
    limits: StepLimits
    inputs: InputAddresses
    arena: Arena
    caches: Mapping[int, LayerCache]
    rotary: Mapping[RopeConfig, int]
    newest: int | None
    scratch_bytes: Callable[[AttentionConfig], int]
    hidden: int = field(init=False)

    def __post_init__(self) -> None:
        self.hidden = self.floats(self.limits.max_tokens, self.n_embd)

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return self.weights.config.n_embd

    def floats(self, rows: int, width: int) -> int:
        """Room for float32 rows."""
        return self.arena.take(4 * rows * width)

    def activation(self, rows: int, width: int, readers: Iterable[Matrix]) -> Activation:
        """Room for rows in the forms their readers want: float32 for float matrices, else quants."""
        types = {matrix.type for matrix in readers}
        result = Activation()
        if types & (_FLOAT_TYPES | {UNKNOWN_TYPE}):
            result.values = self.floats(rows, width)
        if types - _FLOAT_TYPES:
            blocks = rows * width // QUANT_BLOCK
            result.quants = self.arena.take(rows * width)
            result.scales = self.floats(blocks, 1)
            result.sums = self.floats(blocks, 1)
        return result

    def norm(
        self, device: Device, rows: int, weight: int, out: Activation, over_outputs: bool = False
    ) -> None:
        """The residual stream's root mean square norm, of all tokens' rows or of the output rows.

        Source: https://arxiv.org/abs/1910.07467
        """
        arguments = RmsNormArguments(
            step=self.inputs.step,
            x=self.hidden,
            rows=self.inputs.output_rows if over_outputs else None,
            weight=weight,
            out=out,
            width=self.n_embd,
            eps=self.weights.config.norm_eps,
        )
        device.launch("rms_norm", arguments, rows)

    def multiply(
        self,
        device: Device,
        rows: int,
        x: Activation,
        width: int,
        products: Sequence[tuple[Matrix, int]],
        *,
        accumulate: bool = False,
        over_outputs: bool = False,
    ) -> None:
        """Rows of `width` times up to three matrices, each product into (or onto) float32 rows."""
        if not 1 <= len(products) <= MAX_MATRICES:
            raise ValueError(f"a launch multiplies with 1 to {MAX_MATRICES} matrices, not {len(products)}")
        arguments = MatmulArguments(
            step=self.inputs.step,
            x=x,
            w=tuple(matrix for matrix, _ in products),
            y=tuple(address for _, address in products),
            n_matrices=len(products),
            width=width,
            accumulate=accumulate,
            over_outputs=over_outputs,
        )
        device.launch("matmul", arguments, rows)


@dataclass(frozen=True, slots=True)
class Product:
    """Rows of `width`, and the matrix that they are to be multiplied with."""

    x: Activation
    width: int
    matrix: Matrix


class Block(ABC):
    """One branch of a layer: ``x += body(norm(x))`` on the residual stream.

    Args:
        site: of the stage.
        layer: its number in the model.
        norm: role of the norm's weight.
        readers: roles of the matrices that read the normalized stream.
    """

    def __init__(self, site: Site, layer: int, norm: str, readers: Sequence[str]) -> None:
        self.site = site
        self.weights = site.weights.layers[layer]
        self.readers = [self.weights.matrix(role) for role in readers]
        self.normed = site.activation(site.limits.max_tokens, site.n_embd, self.readers)
        self._norm = self.weights.vector(norm)

    def launch(self, device: Device, rows: int) -> None:
        """Put the operations of the block in order."""
        self.site.norm(device, rows, self._norm, self.normed)
        last = self.body(device, rows)
        products = [(last.matrix, self.site.hidden)]
        self.site.multiply(device, rows, last.x, last.width, products, accumulate=True)

    @abstractmethod
    def body(self, device: Device, rows: int) -> Product:
        """Put the operations between norm and residual stream in order; returns what the stream gets."""
