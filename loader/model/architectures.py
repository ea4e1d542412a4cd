"""From a file's metadata to a configuration: an architecture is a function that makes the layers.

Keys and defaults are those of the GGUF specification as llama.cpp reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from pydantic import ValidationError

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile
from redshard.loader.model.configuration import (
    AttentionConfig,
    Branch,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    RopeStyle,
    UnsupportedModelError,
)
from redshard.loader.model.metadata import Keys
from redshard.loader.model.tensors import require_tensor

Layers = tuple[LayerConfig, ...]


def read_config(file: GGUFFile) -> ModelConfig:
    """The model that a file holds.

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
    keys = Keys(file, architecture)
    try:
        return ModelConfig(
            architecture=architecture,
            name=str(file.metadata.get("general.name", file.path.stem)),
            n_embd=keys.integer("embedding_length"),
            n_vocab=_count_vocabulary(file),
            context_length=keys.integer("context_length"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            tied_embeddings="output.weight" not in file.tensors,
            layers=ARCHITECTURES[architecture](keys),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        subject = f"{field} = {first['input']!r}: " if field else ""
        raise GGUFError(file.path, f"hyperparameters make no sense: {subject}{first['msg']}") from None


def _llama(keys: Keys) -> Layers:
    # The converter has permuted the rows of q and k, so that adjacent elements rotate together.
    return _attention_then_feed_forward(keys, "norm")


def _qwen2(keys: Keys) -> Layers:
    return _attention_then_feed_forward(keys, "neox")


def _qwen3(keys: Keys) -> Layers:
    return _attention_then_feed_forward(keys, "neox", qk_norm=True)


#: By the value of ``general.architecture``.
ARCHITECTURES: dict[str, Callable[[Keys], Layers]] = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3}


def _attention_then_feed_forward(keys: Keys, rope_style: RopeStyle, qk_norm: bool = False) -> Layers:
    """Layers of attention and a gated feed-forward, both of the normalized stream."""
    if keys.integer("expert_count", 0):
        raise UnsupportedModelError(
            f"{keys.path}: mixtures of experts are not supported for {keys.architecture}"
        )
    n_heads = keys.by_layer("attention.head_count", least=1)
    default_dim = keys.integer("embedding_length") // n_heads[0]
    head_dim = keys.integer("attention.key_length", default_dim)
    value_dim = keys.integer("attention.value_length", default_dim)
    rope = _rope(keys, rope_style, head_dim)
    layers = []
    for heads, kv_heads, n_ff in zip(
        n_heads,
        keys.by_layer("attention.head_count_kv", n_heads),
        keys.by_layer("feed_forward_length"),
        strict=True,
    ):
        attention = AttentionConfig(
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=head_dim**-0.5,
            qk_norm=qk_norm,
            rope=rope,
        )
        feed_forward = FeedForwardConfig(n_ff=n_ff)
        branches = Branch(norm="attn_norm", body=attention), Branch(norm="ffn_norm", body=feed_forward)
        layers.append(LayerConfig(branches=branches))
    return tuple(layers)


def _rope(keys: Keys, style: RopeStyle, head_dim: int) -> RopeConfig:
    scaling = keys.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{keys.path}: rope scaling {scaling!r} is not supported")
    # A factor of 0 means none; the second key is the name the first had before rope.scaling.type existed.
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    if scaling == "none" or (scaling == "linear" and factor == 1.0):
        scaling, factor = "none", 1.0
    original_context = keys.integer("rope.scaling.original_context_length", 0)
    return RopeConfig(
        style=style,
        n_rot=keys.integer("rope.dimension_count", head_dim),
        base=keys.number("rope.freq_base", 10000.0),
        scaling=cast(RopeScaling, scaling),
        factor=factor,
        original_context=original_context or keys.integer("context_length"),
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
    )


def _count_vocabulary(file: GGUFFile) -> int:
    table = require_tensor(file.tensors, file.path, "token_embd.weight")
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
