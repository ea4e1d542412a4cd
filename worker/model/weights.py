"""What a stage has of a model: its part of the layers, and their tensors on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from redshard.loader.gguf.gguf_file import TensorInfo
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.model.tensors import ModelTensors
from redshard.worker.device.arguments import Matrix
from redshard.worker.memory.pool import View


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

    def bytes_per_token(self, model: ModelTensors) -> int:
        """Weights that decoding one token reads: all but the token table, of which it reads one row."""
        read = [info for layer in self.layers for info in model.layer_tensors(layer).values()]
        if self.is_last:
            read += model.output_tensors().values()
        nbytes = sum(info.nbytes for info in read)
        if self.is_first:
            table = model.input_tensors()["token_embd"]
            nbytes += table.nbytes // table.shape[0]
        return nbytes

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


class Weights(Protocol):
    """Tensors by role: those of a layer, or those before and after all layers."""

    def matrix(self, role: str) -> Matrix:
        """A matrix with its bias."""
        ...

    def vector(self, role: str) -> int:
        """Address of a float32 vector."""
        ...

    def optional_vector(self, role: str) -> int | None:
        """Address of a float32 vector, or None where the model has none."""
        ...


class LoadedWeights(Weights):
    """Tensors on the device.

    Args:
        tensors: by role.
        views: device memory, by the tensors' names in the file.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], views: Mapping[str, View]) -> None:
        self._tensors, self._views = tensors, views

    def matrix(self, role: str) -> Matrix:
        info = self._tensors[role]
        return Matrix(
            data=self._views[info.name].address,
            bias=self.optional_vector(f"{role}_bias"),
            type=info.type.ggml_id,
            n_rows=info.shape[0],
        )

    def vector(self, role: str) -> int:
        return self._views[self._tensors[role].name].address

    def optional_vector(self, role: str) -> int | None:
        return self.vector(role) if role in self._tensors else None


@dataclass(frozen=True, slots=True)
class StageWeights:
    """The weights of a stage.

    Attributes:
        config: the model.
        part: what the stage has of it.
        layers: by the layers' numbers in the model.
        ends: of the embedding and the output, where the stage has them.
    """

    config: ModelConfig
    part: StagePart
    layers: Mapping[int, Weights]
    ends: Weights

    @classmethod
    def loaded(
        cls, config: ModelConfig, tensors: ModelTensors, part: StagePart, views: Mapping[str, View]
    ) -> StageWeights:
        """The tensors of a part in device memory, by their names in the file."""
        layers = {layer: LoadedWeights(tensors.layer_tensors(layer), views) for layer in part.layers}
        return cls(config, part, layers, LoadedWeights(part.end_tensors(tensors), views))
