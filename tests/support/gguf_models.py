"""Writes GGUF models with random weights, from tiny ones for tests to real shapes for benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.configuration import (
    AttentionConfig,
    Branch,
    FeedForwardConfig,
    LayerConfig,
    ModelConfig,
    RopeConfig,
)

_ALWAYS_BIASED = {"llama": (), "qwen2": ("attn_q", "attn_k", "attn_v"), "qwen3": ()}

#: A tensor's name and numpy shape -> the type to store it in. Vectors are always F32.
TypeChooser = Callable[[str, tuple[int, ...]], QuantType]

# Formats whose blocks hold float16 factors: their byte offsets, each with its size relative to the first. The
# factors of minimums are such that random quants average to about zero.
_HALF_FACTORS: dict[QuantType, tuple[tuple[int, float], ...]] = {
    QuantType.Q4_0: ((0, 1.0),),
    QuantType.Q4_1: ((0, 1.0), (2, -7.5)),
    QuantType.Q5_0: ((0, 1.0),),
    QuantType.Q5_1: ((0, 1.0), (2, -15.5)),
    QuantType.Q8_0: ((0, 1.0),),
    QuantType.Q2_K: ((80, 1.0), (82, 1.5)),
    QuantType.Q3_K: ((108, 1.0),),
    QuantType.Q4_K: ((0, 1.0), (2, 7.5)),
    QuantType.Q5_K: ((0, 1.0), (2, 15.5)),
    QuantType.Q6_K: ((208, 1.0),),
    QuantType.IQ2_XXS: ((0, 1.0),),
    QuantType.IQ2_XS: ((0, 1.0),),
    QuantType.IQ2_S: ((0, 1.0),),
    QuantType.IQ3_XXS: ((0, 1.0),),
    QuantType.IQ3_S: ((0, 1.0),),
    QuantType.IQ1_S: ((0, 1.0),),
    QuantType.IQ4_NL: ((0, 1.0),),
    QuantType.IQ4_XS: ((0, 1.0),),
    QuantType.TQ1_0: ((52, 1.0),),
    QuantType.TQ2_0: ((64, 1.0),),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A byte-level BPE vocabulary; the first 256 tokens are the bytes, special tokens come last."""

    tokens: list[str]
    merges: list[str]
    token_types: list[int]
    bos: int
    eos: int
    pre: str = "qwen2"
    chat_template: str | None = None


def byte_symbols() -> list[str]:
    """The printable character GPT-2's byte-level BPE gives to each byte, in order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def bpe_vocabulary(merges: Sequence[str], special: Sequence[str], **others: Any) -> Vocabulary:
    """The bytes, the results of the merges, and special tokens, of which the first two are bos and eos."""
    tokens = byte_symbols() + [merge.replace(" ", "") for merge in merges]
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(special)
    n = len(tokens)
    return Vocabulary([*tokens, *special], list(merges), [int(kind) for kind in types], n, n + 1, **others)


TINY_VOCABULARY = bpe_vocabulary(
    ["t h", "th e", "i n", "a n", "e r", "o n", "r e", "Ġ the", "in g", "o u", "an d", "Ġ and", "l l", "Ġ a"],
    ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"],
    chat_template="{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
)


def large_vocabulary(n_tokens: int, special: Sequence[str], seed: int = 0, **others: Any) -> Vocabulary:
    """A vocabulary of any size: made-up words of ASCII letters, and the merges that spell them."""
    rng = np.random.default_rng(seed)
    words = list("etaoinshrdlucmfwypvbgkjqxzĠ")
    known = set(words)
    merges: list[str] = []
    wanted = n_tokens - 256 - len(special)
    while len(merges) < wanted:
        # Words made early are picked often, as in a trained vocabulary.
        for left, right in rng.random((wanted, 2)) ** 3:
            first, second = words[int(left * len(words))], words[int(right * len(words))]
            word = first + second
            if len(word) <= 12 and word not in known and not second.startswith("Ġ"):
                words.append(word)
                known.add(word)
                merges.append(f"{first} {second}")
    return bpe_vocabulary(merges[:wanted], special, **others)


def tiny_config(architecture: str = "llama", **changes: Any) -> ModelConfig:
    """A model of two small layers; changes to the rotary embedding are given as ``rope=dict(...)``.

    ``n_heads``, ``n_kv_heads`` and ``n_ff`` may be given for each layer.
    """
    n_layers = changes.pop("n_layers", 2)
    n_heads = _by_layer(changes.pop("n_heads", 4), n_layers)
    n_kv_heads = _by_layer(changes.pop("n_kv_heads", [n // 2 for n in n_heads]), n_layers)
    widths = _by_layer(changes.pop("n_ff", 256), n_layers)
    head_dim = changes.pop("head_dim", 32)
    value_dim = changes.pop("value_dim", head_dim)
    context_length = changes.pop("context_length", 512)
    rope = {
        "style": "norm" if architecture == "llama" else "neox",
        "n_rot": head_dim,
        "base": 10000.0,
        "scaling": "none",
        "factor": 1.0,
        "original_context": context_length,
        "attention_factor": 1.0,
        **changes.pop("rope", {}),
    }
    layers = []
    for heads, kv_heads, n_ff in zip(n_heads, n_kv_heads, widths, strict=True):
        attention = AttentionConfig(
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=head_dim**-0.5,
            qk_norm=architecture == "qwen3",
            rope=RopeConfig(**rope),
        )
        feed_forward = FeedForwardConfig(n_ff=n_ff)
        branches = Branch(norm="attn_norm", body=attention), Branch(norm="ffn_norm", body=feed_forward)
        layers.append(LayerConfig(branches=branches))
    values = {
        "architecture": architecture,
        "name": f"tiny {architecture}",
        "n_embd": n_heads[0] * head_dim,
        "n_vocab": len(TINY_VOCABULARY.tokens),
        "context_length": context_length,
        "norm_eps": float(np.float32(1e-5)),
        "tied_embeddings": False,
        "layers": tuple(layers),
    }
    return ModelConfig(**{**values, **changes})


def attention_of(config: ModelConfig, layer: int = 0) -> AttentionConfig:
    """How a layer attends."""
    (attention,) = config.layers[layer].attention
    return attention


def feed_forward_of(config: ModelConfig, layer: int = 0) -> FeedForwardConfig:
    """A layer's feed-forward."""
    bodies = [branch.body for branch in config.layers[layer].branches]
    (body,) = (body for body in bodies if isinstance(body, FeedForwardConfig))
    return body


def _by_layer(value: int | Sequence[int], n_layers: int) -> Sequence[int]:
    return [value] * n_layers if isinstance(value, int) else value


def write_model(
    path: Path,
    config: ModelConfig,
    types: QuantType | TypeChooser = QuantType.F32,
    *,
    seed: int = 0,
    vocabulary: Vocabulary = TINY_VOCABULARY,
    freq_factors: np.ndarray | None = None,
    metadata: Mapping[str, Any] | None = None,
    biases: Collection[str] = (),
    tensors_per_file: int = 0,
) -> Path:
    """Write a model with random weights that keep activations near one.

    Args:
        path: the file; with `tensors_per_file`, the name of the split set without its ``-00001-of-000NN``.
        config: what to write; `read_config` reads the same back.
        types: one type for all matrices, or one chosen for each.
        seed: of the weights; the same seed and arguments give the same file.
        vocabulary: of n_vocab tokens.
        freq_factors: (n_rot / 2,), written as ``rope_freqs``.
        metadata: keys to add or to replace; None removes a key.
        biases: names of matrices, such as ``ffn_up``, that get a bias; those of query, key and value of a
            qwen2 model have one anyway.
        tensors_per_file: of a split set; 0 writes one file.

    Returns:
        The file written, or the first one of the split set.
    """
    choose = types if callable(types) else lambda name, shape: types
    shapes = dict(_tensor_shapes(config))
    for name, shape in list(shapes.items()):
        if name.removesuffix(".weight").rpartition(".")[2] in {*biases, *_ALWAYS_BIASED[config.architecture]}:
            shapes[name.replace(".weight", ".bias")] = shape[:1]
    if config.tied_embeddings and "output" in biases:
        shapes["output.bias"] = (config.n_vocab,)
    if freq_factors is not None:
        shapes["rope_freqs.weight"] = freq_factors.shape
    chosen = {
        name: choose(name, shape) if len(shape) == 2 else QuantType.F32 for name, shape in shapes.items()
    }

    writer = gguf.GGUFWriter(path, config.architecture, split_max_tensors=tensors_per_file)
    for key, value in {**_metadata(config, vocabulary), **(metadata or {})}.items():
        if value is not None:
            writer.add_key_value(key, value, _value_type(value))
    for name, shape in shapes.items():
        raw_type = gguf.GGMLQuantizationType(chosen[name].ggml_id)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), chosen[name].nbytes(shape), raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    # Tensor by tensor, so that a model of any size needs little memory.
    for name, shape in shapes.items():
        writer.write_tensor_data(_random_tensor(rng, config, name, shape, chosen[name], freq_factors))
    written = writer.format_shard_names(path)[0]
    writer.close()
    return written


def random_blocks(
    rng: np.random.Generator, quant_type: QuantType, shape: tuple[int, int], std: float
) -> np.ndarray:
    """A random matrix as stored, uint8 (rows, bytes per row), its elements of standard deviation `std`."""
    rows, columns = shape
    row_bytes = quant_type.nbytes((columns,))
    if quant_type in (QuantType.F32, QuantType.F16, QuantType.BF16):
        weights = rng.standard_normal(shape, np.float32) * np.float32(std)
        return gguf.quantize(weights, gguf.GGMLQuantizationType(quant_type.ggml_id)).view(np.uint8)
    blocks = _unit_blocks(rng, quant_type, rows * columns // quant_type.block_elements)
    sample = gguf.dequantize(blocks[:4096], gguf.GGMLQuantizationType(quant_type.ggml_id))
    scale = std / float(sample.std())
    if quant_type is QuantType.MXFP4:
        blocks[:, 0] = np.clip(blocks[:, 0].astype(int) + round(math.log2(scale)), 1, 254)
    else:
        for offset, _ in _HALF_FACTORS[quant_type]:
            factors = blocks[:, offset : offset + 2].view(np.float16)
            factors[:] = factors.astype(np.float32) * scale
    return blocks.reshape(rows, row_bytes)


def _unit_blocks(rng: np.random.Generator, quant_type: QuantType, count: int) -> np.ndarray:
    """Random blocks whose factors are near one."""
    raw = bytearray(rng.bytes(count * quant_type.block_bytes))
    blocks = np.frombuffer(raw, np.uint8).reshape(count, quant_type.block_bytes)
    if quant_type is QuantType.MXFP4:
        blocks[:, 0] = rng.integers(126, 129, count)
        return blocks
    if quant_type not in _HALF_FACTORS:
        raise ValueError(f"random {quant_type.name} blocks are not supported")
    spread = rng.uniform(0.5, 1.5, count)
    for offset, relative in _HALF_FACTORS[quant_type]:
        blocks[:, offset : offset + 2] = (spread * relative).astype(np.float16)[:, None].view(np.uint8)
    return blocks


def _random_tensor(
    rng: np.random.Generator,
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    quant_type: QuantType,
    freq_factors: np.ndarray | None,
) -> np.ndarray:
    if name == "rope_freqs.weight":
        assert freq_factors is not None
        return freq_factors.astype(np.float32)
    if len(shape) == 1:
        noise = 0.1 * rng.standard_normal(shape, np.float32)
        return noise if name.endswith(".bias") else 1 + noise
    std = 1.0 if name == "token_embd.weight" and not config.tied_embeddings else 1 / math.sqrt(shape[1])
    if name.endswith(("attn_output.weight", "ffn_down.weight")):
        std /= math.sqrt(2 * config.n_layers)
    return random_blocks(rng, quant_type, (shape[0], shape[1]), std)


def _tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    embd = config.n_embd
    yield "token_embd.weight", (config.n_vocab, embd)
    yield "output_norm.weight", (embd,)
    if not config.tied_embeddings:
        yield "output.weight", (config.n_vocab, embd)
    for layer in range(config.n_layers):
        prefix, attention, ff = (
            f"blk.{layer}.",
            attention_of(config, layer),
            feed_forward_of(config, layer).n_ff,
        )
        yield prefix + "attn_norm.weight", (embd,)
        yield prefix + "attn_q.weight", (attention.n_heads * attention.head_dim, embd)
        yield prefix + "attn_k.weight", (attention.n_kv_heads * attention.head_dim, embd)
        yield prefix + "attn_v.weight", (attention.n_kv_heads * attention.value_dim, embd)
        if attention.qk_norm:
            yield prefix + "attn_q_norm.weight", (attention.head_dim,)
            yield prefix + "attn_k_norm.weight", (attention.head_dim,)
        yield prefix + "attn_output.weight", (embd, attention.n_heads * attention.value_dim)
        yield prefix + "ffn_norm.weight", (embd,)
        yield prefix + "ffn_gate.weight", (ff, embd)
        yield prefix + "ffn_up.weight", (ff, embd)
        yield prefix + "ffn_down.weight", (embd, ff)


def _metadata(config: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    if len(vocabulary.tokens) != config.n_vocab:
        raise ValueError(f"{config.n_vocab} rows of embeddings for {len(vocabulary.tokens)} tokens")
    attention = [attention_of(config, layer) for layer in range(config.n_layers)]
    rope = attention[0].rope
    scaling = {
        "rope.scaling.type": rope.scaling,
        "rope.scaling.factor": rope.factor,
        "rope.scaling.original_context_length": rope.original_context,
        "rope.scaling.attn_factor": rope.attention_factor,
    }
    hyperparameters = {
        "context_length": config.context_length,
        "embedding_length": config.n_embd,
        "block_count": config.n_layers,
        "feed_forward_length": _one_or_all(feed_forward_of(config, i).n_ff for i in range(config.n_layers)),
        "attention.head_count": _one_or_all(layer.n_heads for layer in attention),
        "attention.head_count_kv": _one_or_all(layer.n_kv_heads for layer in attention),
        "attention.key_length": attention[0].head_dim,
        "attention.value_length": attention[0].value_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": rope.n_rot,
        "rope.freq_base": rope.base,
        **(scaling if rope.scaling != "none" else {}),
    }
    return {
        "general.name": config.name,
        **{f"{config.architecture}.{key}": value for key, value in hyperparameters.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.token_types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.bos_token_id": vocabulary.bos,
        "tokenizer.ggml.eos_token_id": vocabulary.eos,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": vocabulary.chat_template,
    }


def _one_or_all(values: Iterable[int]) -> int | list[int]:
    """A value by layer, as files give it."""
    by_layer = list(values)
    return by_layer[0] if len(set(by_layer)) == 1 else by_layer


def _value_type(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)
