"""The tensors of a model by role: which the file must have, of which shape, and none besides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile, TensorInfo
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.configuration import ModelConfig, Shapes, UnsupportedModelError


def require_tensor(tensors: Mapping[str, TensorInfo], path: Path, name: str) -> TensorInfo:
    """A tensor of a file by its name there. Raises GGUFError if it is missing."""
    info = tensors.get(name)
    if info is None:
        raise GGUFError(path, f"tensor {name!r} is missing, so this is not a whole model")
    return info


class ModelTensors:
    """The tensors of a model by role, each present and of the right shape.

    A role is a tensor's name in the file without ``blk.N.`` and ``.weight``. Matrices are (rows out, columns
    in). A matrix of role R may have a float32 bias (rows,): role ``R_bias``.

    Attributes:
        rope_freqs: divisors of the rotary frequencies, float32 (n_rot / 2,), or None. Every stage needs them.
    """

    def __init__(self, config: ModelConfig, file: GGUFFile) -> None:
        """Find and check all tensors of `config` in `file`.

        Raises:
            GGUFError: a tensor is missing, or has the wrong shape or type.
            UnsupportedModelError: the file has tensors that this architecture does not use.
        """
        self._config = config
        self._path = file.path
        self._file_tensors = file.tensors
        n_embd, table = config.n_embd, (config.n_vocab, config.n_embd)
        ends: Shapes = {"token_embd": table, "output_norm": (n_embd,), "output": table}
        if config.ropes:
            ends["rope_freqs"] = (config.ropes[0].n_rot // 2,)
        optional = {"rope_freqs"} | ({"output"} if config.tied_embeddings else set())
        self._model = self._find(ends, "", optional)
        self._layers = [
            self._find(layer.tensors(n_embd), f"blk.{number}.", set())
            for number, layer in enumerate(config.layers)
        ]
        self.rope_freqs = self._model.get("rope_freqs")
        self._refuse_unused()

    def layer_tensors(self, layer: int) -> dict[str, TensorInfo]:
        """Role to tensor for one layer: the roles of its configuration, and the biases the file has."""
        return self._layers[layer]

    def input_tensors(self) -> dict[str, TensorInfo]:
        """What the first stage needs besides layers: ``token_embd``."""
        return {"token_embd": self._model["token_embd"]}

    def output_tensors(self) -> dict[str, TensorInfo]:
        """What the last stage needs besides layers: ``output_norm``, ``output`` and perhaps ``output_bias``.

        With tied embeddings ``output`` is the tensor of ``token_embd``.
        """
        roles = {"output": self._model["token_embd"], **self._model}
        return {role: roles[role] for role in ("output_norm", "output", "output_bias") if role in roles}

    def _find(self, shapes: Shapes, prefix: str, optional: set[str]) -> dict[str, TensorInfo]:
        found = {}
        for role, shape in shapes.items():
            name = f"{prefix}{role}.weight"
            if role not in optional or name in self._file_tensors:
                found[role] = self._checked(name, shape)
            bias = f"{prefix}{role}.bias"
            if len(shape) == 2 and role != "token_embd" and bias in self._file_tensors:
                found[f"{role}_bias"] = self._checked(bias, shape[:1])
        return found

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = require_tensor(self._file_tensors, self._path, name)
        if info.shape != shape:
            raise GGUFError(
                info.path, f"tensor {name!r} has shape {info.shape}, expected {shape}", info.offset
            )
        if len(shape) == 1 and info.type is not QuantType.F32:
            raise GGUFError(info.path, f"tensor {name!r} is {info.type.name}, expected F32", info.offset)
        return info

    def _refuse_unused(self) -> None:
        used = {info.name for group in (self._model, *self._layers) for info in group.values()}
        unused = [name for name in self._file_tensors if name not in used]
        if unused:
            listed = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
            raise UnsupportedModelError(
                f"{self._path}: {len(unused)} tensors are not part of a {self._config.architecture} model "
                f"of {self._config.n_layers} layers: {listed}"
            )
