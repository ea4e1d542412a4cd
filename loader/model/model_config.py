"""What a model is made of: hyperparameters from metadata, and which tensor plays which role.

Keys and defaults are those of the GGUF specification as llama.cpp reads them. Nothing here names a particular
model: an architecture is one row of `ARCHITECTURES`, and everything else comes from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile, TensorInfo
from redshard.loader.gguf.quant_types import QuantType

_DEFAULT_CONTEXT = 4096

RopeStyle = Literal["norm", "neox"]
RopeScaling = Literal["none", "linear", "yarn"]


class UnsupportedModelError(ValueError):
    """A sound file whose model this version cannot run."""


@dataclass(frozen=True, slots=True)
class ArchSpec:
    """One architecture: a row of `ARCHITECTURES`.

    Attributes:
        rope_style: "norm" rotates interleaved pairs (0, 1), (2, 3), ...; "neox" rotates (i, i + n_rot / 2).
        layer_roles: the tensors every layer must have, by role.
    """

    rope_style: RopeStyle
    layer_roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Role:
    """A tensor by its name in the file and its shape, given as names of `ModelConfig` attributes."""

    file_name: str
    dimensions: tuple[str, ...]

    @property
    def has_bias(self) -> bool:
        return len(self.dimensions) == 2 and self.file_name != "token_embd"


_MODEL_ROLES: dict[str, _Role] = {
    "token_embd": _Role("token_embd", ("n_vocab", "n_embd")),
    "output_norm": _Role("output_norm", ("n_embd",)),
    "output": _Role("output", ("n_vocab", "n_embd")),
    "rope_freqs": _Role("rope_freqs", ("n_rot_pairs",)),
}
_LAYER_ROLES: dict[str, _Role] = {
    "attn_norm": _Role("attn_norm", ("n_embd",)),
    "attn_q": _Role("attn_q", ("n_q", "n_embd")),
    "attn_k": _Role("attn_k", ("n_k", "n_embd")),
    "attn_v": _Role("attn_v", ("n_v", "n_embd")),
    "attn_q_norm": _Role("attn_q_norm", ("head_dim",)),
    "attn_k_norm": _Role("attn_k_norm", ("head_dim",)),
    "attn_output": _Role("attn_output", ("n_embd", "n_attn")),
    "ffn_norm": _Role("ffn_norm", ("n_embd",)),
    "ffn_gate": _Role("ffn_gate", ("n_ff", "n_embd")),
    "ffn_up": _Role("ffn_up", ("n_ff", "n_embd")),
    "ffn_down": _Role("ffn_down", ("n_embd", "n_ff")),
}

_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
_FEED_FORWARD = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")

#: By the value of ``general.architecture``.
ARCHITECTURES: dict[str, ArchSpec] = {
    # The converter has permuted the rows of q and k, so that adjacent elements rotate together.
    "llama": ArchSpec("norm", _ATTENTION + _FEED_FORWARD),
    "qwen2": ArchSpec("neox", _ATTENTION + _FEED_FORWARD),
    "qwen3": ArchSpec("neox", _ATTENTION + _HEAD_NORMS + _FEED_FORWARD),
}


class RopeConfig(BaseModel):
    """Rotary position embedding.

    Attributes:
        n_rot: leading elements of a head that are rotated.
        base: of the geometric series of frequencies.
        factor: by how much the context was stretched; positions are divided by it.
        original_context: context length in tokens before it was stretched (yarn).
        attention_factor: multiplies cosines and sines, on top of yarn's own magnitude.
        beta_fast, beta_slow: rotations within the original context above which a frequency is kept, and below
            which it is fully stretched (yarn). llama.cpp reads no key for them in these architectures.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    style: RopeStyle
    n_rot: int = Field(gt=0, multiple_of=2)
    base: float = Field(gt=1.0)
    scaling: RopeScaling
    factor: float = Field(gt=0.0)
    original_context: int = Field(gt=0)
    attention_factor: float = Field(gt=0.0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class ModelConfig(BaseModel):
    """Hyperparameters of a decoder-only transformer.

    Attributes:
        n_heads, n_kv_heads: query heads and key/value heads; the former is a multiple of the latter.
        head_dim: elements of a query or key head; value_dim: of a value head.
        n_ff: width of the feed-forward layer.
        n_vocab: rows of the token embedding.
        context_length: tokens the model was made for.
        norm_eps: of the root mean square norms.
        qk_norm: query and key heads are normalized before they are rotated.
        qkv_bias: the query, key and value projections have a bias.
        tied_embeddings: the token embedding is also the output matrix.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    architecture: str
    name: str
    n_layers: int = Field(gt=0)
    n_embd: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    value_dim: int = Field(gt=0)
    n_ff: int = Field(gt=0)
    n_vocab: int = Field(gt=0)
    context_length: int = Field(gt=0)
    norm_eps: float = Field(gt=0.0)
    rope: RopeConfig
    qk_norm: bool
    qkv_bias: bool
    tied_embeddings: bool

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.rope.n_rot > self.head_dim:
            raise ValueError(f"{self.rope.n_rot} rotated elements exceed the head size {self.head_dim}")
        return self

    @property
    def spec(self) -> ArchSpec:
        return ARCHITECTURES[self.architecture]

    @property
    def default_context(self) -> int:
        """Tokens of a sequence where nobody asks for more: long contexts cost cache."""
        return min(self.context_length, _DEFAULT_CONTEXT)

    @property
    def n_q(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def n_k(self) -> int:
        """Width of all key heads together."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_v(self) -> int:
        """Width of all value heads together."""
        return self.n_kv_heads * self.value_dim

    @property
    def n_attn(self) -> int:
        """Width of the attention's result."""
        return self.n_heads * self.value_dim

    @property
    def n_rot_pairs(self) -> int:
        return self.rope.n_rot // 2

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> ModelConfig:
        """Read the hyperparameters.

        Raises:
            UnsupportedModelError: the architecture, or something the file asks of it, is not known.
            GGUFError: a key is missing or makes no sense.
        """
        architecture = file.metadata.get("general.architecture")
        if architecture is None:
            raise GGUFError(file.path, "metadata key general.architecture is missing")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UnsupportedModelError(
                f"{file.path}: architecture {architecture!r} is not supported; known are {known}"
            )
        try:
            return _read_config(file, architecture)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            subject = f"{field} = {first['input']!r}: " if field else ""
            raise GGUFError(file.path, f"hyperparameters make no sense: {subject}{first['msg']}") from None


class _Keys:
    """Typed access to the metadata below ``ARCHITECTURE.``; a key without a default must be there."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.path = file.path
        self.architecture = architecture
        self._metadata = file.metadata

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise self._wrong(key, "an integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise self._wrong(key, "a number", value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def layer_integer(self, key: str, default: int | None = None) -> int:
        """The one value of a key that may hold a value for each layer."""
        value = self._value(key, default)
        if not isinstance(value, np.ndarray):
            return self.integer(key, default)
        if value.dtype.kind not in "iu" or len(value) == 0:
            raise self._wrong(key, "one integer or one for each layer", value)
        if (value != value[0]).any():
            raise UnsupportedModelError(
                f"{self.path}: {self.architecture}.{key} differs between layers, which is not supported"
            )
        return int(value[0])

    def _value(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise GGUFError(self.path, f"metadata key {self.architecture}.{key} is missing")
        return value

    def _wrong(self, key: str, expected: str, value: object) -> GGUFError:
        return GGUFError(self.path, f"{self.architecture}.{key} must be {expected}, found {value!r:.40}")


def _read_config(file: GGUFFile, architecture: str) -> ModelConfig:
    keys = _Keys(file, architecture)
    if keys.integer("expert_count", 0):
        raise UnsupportedModelError(f"{file.path}: mixtures of experts are not supported for {architecture}")
    n_embd = keys.integer("embedding_length")
    n_heads = keys.layer_integer("attention.head_count")
    if n_heads <= 0:
        raise GGUFError(file.path, f"{architecture}.attention.head_count must be positive, found {n_heads}")
    head_dim = keys.integer("attention.key_length", n_embd // n_heads)
    context_length = keys.integer("context_length")
    spec = ARCHITECTURES[architecture]
    return ModelConfig(
        architecture=architecture,
        name=str(file.metadata.get("general.name", file.path.stem)),
        n_layers=keys.integer("block_count"),
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=keys.layer_integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        value_dim=keys.integer("attention.value_length", n_embd // n_heads),
        n_ff=keys.layer_integer("feed_forward_length"),
        n_vocab=_count_vocabulary(file),
        context_length=context_length,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_read_rope(keys, spec.rope_style, head_dim, context_length),
        qk_norm="attn_q_norm" in spec.layer_roles,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
    )


def _count_vocabulary(file: GGUFFile) -> int:
    table = _require(file.tensors, file.path, "token_embd.weight")
    if len(table.shape) != 2:
        raise GGUFError(
            table.path, f"tensor {table.name!r} of shape {table.shape} is not a matrix", table.offset
        )
    rows, tokens = table.shape[0], file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise GGUFError(
            table.path, f"tensor {table.name!r} has {rows} rows for {len(tokens)} tokens", table.offset
        )
    return rows


def _read_rope(keys: _Keys, style: RopeStyle, head_dim: int, context_length: int) -> RopeConfig:
    scaling = keys.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{keys.path}: rope scaling {scaling!r} is not supported")
    # A factor of 0 means none; the second key is the name the first had before rope.scaling.type existed.
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if scaling == "none" or (scaling == "linear" and factor == 1.0):
        scaling, factor = "none", 1.0
    return RopeConfig(
        style=style,
        n_rot=keys.integer("rope.dimension_count", head_dim),
        base=keys.number("rope.freq_base", 10000.0),
        scaling=cast(RopeScaling, scaling),
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", 0) or context_length,
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
    )


def _require(tensors: Mapping[str, TensorInfo], path: Path, name: str) -> TensorInfo:
    info = tensors.get(name)
    if info is None:
        raise GGUFError(path, f"tensor {name!r} is missing, so this is not a whole model")
    return info


class ModelTensors:
    """The tensors of a model by role, each present and of the right shape.

    Matrices are (rows out, columns in). A matrix of role R may have a float32 bias (rows,): role ``R_bias``.

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
        optional = {"rope_freqs"} | ({"output"} if config.tied_embeddings else set())
        self._model = self._find(_MODEL_ROLES, "", optional)
        layer_roles = {role: _LAYER_ROLES[role] for role in config.spec.layer_roles}
        self._layers = [self._find(layer_roles, f"blk.{layer}.", set()) for layer in range(config.n_layers)]
        self.rope_freqs = self._model.get("rope_freqs")
        self._refuse_unused()

    def layer_tensors(self, layer: int) -> dict[str, TensorInfo]:
        """Role to tensor for one layer: the roles of the architecture's row, and the biases the file has."""
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

    def _find(self, roles: Mapping[str, _Role], prefix: str, optional: set[str]) -> dict[str, TensorInfo]:
        found = {}
        for role, row in roles.items():
            shape = tuple(getattr(self._config, dimension) for dimension in row.dimensions)
            name = f"{prefix}{row.file_name}.weight"
            if role not in optional or name in self._file_tensors:
                found[role] = self._checked(name, shape)
            bias = f"{prefix}{row.file_name}.bias"
            if row.has_bias and bias in self._file_tensors:
                found[f"{role}_bias"] = self._checked(bias, shape[:1])
        return found

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = _require(self._file_tensors, self._path, name)
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
