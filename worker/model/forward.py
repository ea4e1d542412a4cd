"""The forward pass of a stage: its weights by role, its activations in one arena, and the ops in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from redshard.loader.gguf.gguf_file import TensorInfo
from redshard.loader.model.model_config import ModelConfig, ModelTensors
from redshard.worker.device.arguments import Activation, Matrix
from redshard.worker.device.base import Device
from redshard.worker.memory.packing import align_up
from redshard.worker.memory.pool import View
from redshard.worker.model import ops
from redshard.worker.model.sampler import SampleAddresses, SampleOutputs
from redshard.worker.model.step_inputs import InputAddresses, StepLimits

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class StagePart:
    """Which part of a model a stage has.

    Attributes:
        layers: ascending; may be empty, since a pipeline may have more stages than the model has layers.
        is_first: it embeds the tokens.
        is_last: it gives logits or samples.
    """

    layers: range
    is_first: bool
    is_last: bool

    def tensors(self, model: ModelTensors) -> list[TensorInfo]:
        """The tensors of the part, each once."""
        groups = [*(model.layer_tensors(layer) for layer in self.layers), self.end_tensors(model)]
        return list({info.name: info for group in groups for info in group.values()}.values())

    def end_tensors(self, model: ModelTensors) -> dict[str, TensorInfo]:
        """Role to tensor besides the layers': the token table on the first, the output on the last stage."""
        ends: dict[str, TensorInfo] = {}
        if self.is_first:
            ends |= model.input_tensors()
        if self.is_last:
            ends |= model.output_tensors()
        return ends

    def check(self, n_layers: int) -> None:
        """Raise ValueError if a model of `n_layers` has no such part."""
        layers = self.layers
        if not (layers or self.is_first or self.is_last):
            raise ValueError("a stage between the first and the last must have layers")
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= n_layers:
            raise ValueError(f"layers {layers} are not among the model's {n_layers}")
        if (self.is_first and layers.start != 0) or (self.is_last and layers.stop != n_layers):
            raise ValueError(
                f"the first stage must begin with layer 0 and the last end with {n_layers - 1}: {self}"
            )


class StageWeights:
    """The tensors of a stage on the device, by layer and role.

    Args:
        config: the model.
        tensors: its tensors by role.
        part: what the stage has of them.
        views: device memory of the stage's tensors, by their names in the file.
    """

    def __init__(
        self, config: ModelConfig, tensors: ModelTensors, part: StagePart, views: Mapping[str, View]
    ) -> None:
        self.config = config
        self.part = part
        self._tensors = tensors
        self._views = views
        self._groups = {layer: tensors.layer_tensors(layer) for layer in part.layers}
        self._model = part.end_tensors(tensors)

    def matrix(self, role: str, layer: int | None = None) -> Matrix:
        """A matrix with its bias, of a layer or of the model as a whole."""
        info = self._group(layer)[role]
        return Matrix(
            data=self._views[info.name].address,
            bias=self.optional_vector(f"{role}_bias", layer),
            type=info.type.ggml_id,
            n_rows=info.shape[0],
        )

    def vector(self, role: str, layer: int | None = None) -> int:
        """Address of a float32 vector."""
        return self._views[self._group(layer)[role].name].address

    def optional_vector(self, role: str, layer: int | None = None) -> int | None:
        """Address of a float32 vector, or None where the model has none."""
        return self.vector(role, layer) if role in self._group(layer) else None

    def matrices(self, *roles: str) -> list[Matrix]:
        """The matrices of these roles in all layers of the stage."""
        return [self.matrix(role, layer) for layer in self.part.layers for role in roles]

    def bytes_per_token(self) -> int:
        """Weights that decoding one token reads: all but the token table, of which it reads one row."""
        read = [info for group in self._groups.values() for info in group.values()]
        if self.part.is_last:
            read += self._tensors.output_tensors().values()
        nbytes = sum(info.nbytes for info in read)
        if self.part.is_first:
            table = self._model["token_embd"]
            nbytes += table.nbytes // table.shape[0]
        return nbytes

    def _group(self, layer: int | None) -> Mapping[str, TensorInfo]:
        return self._model if layer is None else self._groups[layer]


class Arena:
    """Hands out ranges of one allocation. Ranges taken within a phase are reused by the next phase.

    With base 0 it measures: `nbytes` is what the allocation must have.
    """

    def __init__(self, base: int = 0) -> None:
        self.nbytes = 0
        self._base = base
        self._top = 0

    def take(self, nbytes: int) -> int:
        """Address of `nbytes` bytes, aligned to 256."""
        address = self._base + self._top
        self._top += align_up(nbytes, _ALIGNMENT)
        self.nbytes = max(self.nbytes, self._top)
        return address

    @contextmanager
    def phase(self) -> Iterator[None]:
        """What is taken within is free again afterwards."""
        mark = self._top
        yield
        self._top = mark


@dataclass(slots=True)
class Activations:
    """Addresses of everything that lives no longer than a step; shapes have the limits' rows.

    Attributes:
        hidden: the residual stream, float32 (tokens, n_embd); always the first in the arena.
        normed: what the matrices of a layer read, (tokens, n_embd).
        q, k, v: float32 (tokens, heads x size).
        mixed: what attention gives, (tokens, n_attn).
        scratch: of attention, `scratch_bytes` bytes.
        gated: between the matrices of the feed-forward layer, (tokens, n_ff).
        final: normalized output rows, (outputs, n_embd); logits: float32 (outputs, n_vocab);
            sampled: what `SampleOutputs` lays out. The last stage alone has them.
    """

    hidden: int
    normed: Activation
    q: int = 0
    k: int = 0
    v: int = 0
    mixed: Activation = field(default_factory=Activation)
    scratch: int = 0
    scratch_bytes: int = 0
    gated: Activation = field(default_factory=Activation)
    final: Activation = field(default_factory=Activation)
    logits: int = 0
    sampled: int = 0


def lay_out(arena: Arena, weights: StageWeights, limits: StepLimits, scratch_bytes: int) -> Activations:
    """Place the activations of a stage; attention, feed-forward layer and output share memory in turn."""
    config, rows = weights.config, limits.max_tokens
    readers = weights.matrices("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
    at = Activations(
        hidden=arena.take(4 * rows * config.n_embd),
        normed=ops.activation(arena.take, rows, config.n_embd, readers),
        scratch_bytes=scratch_bytes,
    )
    with arena.phase():
        at.q = arena.take(4 * rows * config.n_q)
        at.k = arena.take(4 * rows * config.n_k)
        at.v = arena.take(4 * rows * config.n_v)
        at.mixed = ops.activation(arena.take, rows, config.n_attn, weights.matrices("attn_output"))
        at.scratch = arena.take(scratch_bytes)
    with arena.phase():
        at.gated = ops.activation(arena.take, rows, config.n_ff, weights.matrices("ffn_down"))
    if weights.part.is_last:
        rows = limits.max_outputs
        with arena.phase():
            at.final = ops.activation(arena.take, rows, config.n_embd, [weights.matrix("output")])
            at.logits = arena.take(4 * rows * config.n_vocab)
            at.sampled = arena.take(SampleOutputs(rows).nbytes(n_top=1))
    return at


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Launches the ops of a stage. Each method takes the rows it must be good for.

    Attributes:
        caches: of each layer of the stage, in order.
        newest: the token sampled last in each slot, int32 (max_sequences,); None where no tokens are sampled.
    """

    device: Device
    weights: StageWeights
    inputs: InputAddresses
    at: Activations
    caches: tuple[ops.LayerCache, ...]
    shape: ops.AttentionShape
    rotary: ops.Rotary
    newest: int | None

    def set_tables(self, rows: int) -> None:
        """The step's changes of the block tables."""
        ops.set_tables(self.device, self.inputs, self.caches[0].tables)

    def layers(self, rows: int) -> None:
        """The residual stream through all layers, on the first stage from the token ids on."""
        if self.weights.part.is_first:
            self.embed(rows)
        for layer in self.weights.part.layers:
            self.layer(layer, rows)

    def embed(self, rows: int) -> None:
        """The residual stream from the token ids."""
        ops.embed(
            self.device,
            self.inputs,
            rows,
            self.weights.matrix("token_embd"),
            self.at.hidden,
            newest=self.newest,
            width=self.weights.config.n_embd,
        )

    def layer(self, layer: int, rows: int) -> None:
        """The residual stream through one layer of the stage, by its number in the model."""
        self._attention(layer, self.caches[layer - self.weights.part.layers.start], rows)
        self._feed_forward(layer, rows)

    def logits(self, rows: int) -> None:
        """Logits of the output rows."""
        output = self.weights.matrix("output")
        ops.matmul(
            self.device,
            self.inputs,
            rows,
            self._norm("output_norm", None, self.at.final, [output], rows),
            [(output, self.at.logits)],
            width=self.weights.config.n_embd,
            over_outputs=True,
        )

    def sample(self, rows: int, out: SampleAddresses, n_top: int) -> None:
        """A token for each output row."""
        assert self.newest is not None
        ops.sample(
            self.device,
            self.inputs,
            rows,
            self.at.logits,
            out,
            newest=self.newest,
            n_vocab=self.weights.config.n_vocab,
            n_top=n_top,
        )

    def _attention(self, layer: int, cache: ops.LayerCache, rows: int) -> None:
        device, inputs, weights, at = self.device, self.inputs, self.weights, self.at
        q, k, v = (weights.matrix(role, layer) for role in ("attn_q", "attn_k", "attn_v"))
        normed = self._norm("attn_norm", layer, at.normed, [q, k, v], rows)
        ops.matmul(
            device, inputs, rows, normed, [(q, at.q), (k, at.k), (v, at.v)], width=self.weights.config.n_embd
        )
        ops.rope_store(
            device,
            inputs,
            rows,
            (at.q, at.k, at.v),
            cache,
            self.shape,
            self.rotary,
            q_norm=weights.optional_vector("attn_q_norm", layer),
            k_norm=weights.optional_vector("attn_k_norm", layer),
            eps=self.weights.config.norm_eps,
        )
        output = weights.matrix("attn_output", layer)
        mixed = ops.read_by(at.mixed, [output])
        ops.attention(
            device,
            inputs,
            rows,
            at.q,
            cache,
            self.shape,
            mixed,
            scratch=at.scratch,
            scratch_bytes=at.scratch_bytes,
        )
        self._add(mixed, output, self.weights.config.n_attn, rows)

    def _feed_forward(self, layer: int, rows: int) -> None:
        gate, up, down = (self.weights.matrix(role, layer) for role in ("ffn_gate", "ffn_up", "ffn_down"))
        normed = self._norm("ffn_norm", layer, self.at.normed, [gate, up], rows)
        gated = ops.read_by(self.at.gated, [down])
        ops.swiglu(self.device, self.inputs, rows, normed, gate, up, gated, width=self.weights.config.n_embd)
        self._add(gated, down, self.weights.config.n_ff, rows)

    def _norm(
        self, role: str, layer: int | None, out: Activation, readers: Iterable[Matrix], rows: int
    ) -> Activation:
        """The normalized residual stream, in the forms of `out` that its readers want."""
        wanted = ops.read_by(out, readers)
        ops.rms_norm(
            self.device,
            self.inputs,
            rows,
            self.at.hidden,
            self.weights.vector(role, layer),
            wanted,
            width=self.weights.config.n_embd,
            eps=self.weights.config.norm_eps,
            over_outputs=layer is None,
        )
        return wanted

    def _add(self, x: Activation, matrix: Matrix, width: int, rows: int) -> None:
        """Add a product to the residual stream."""
        ops.matmul(
            self.device, self.inputs, rows, x, [(matrix, self.at.hidden)], width=width, accumulate=True
        )
