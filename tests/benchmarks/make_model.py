"""Writes a GGUF of a real model's shape with random weights and a vocabulary of the real size.

    python tests/benchmarks/make_model.py qwen2.5-0.5b Q4_K_M out.gguf

Q4_0 and Q4_K_M mix formats as llama.cpp's quantizer does (``llama_tensor_get_type`` in llama-quant.cpp).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Run as a script, this file sees neither the project nor the tests' helpers.
sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from support.gguf_models import TypeChooser, large_vocabulary, tiny_config, write_model  # noqa: E402

from redshard.loader.gguf.quant_types import QuantType  # noqa: E402
from redshard.loader.model.configuration import ModelConfig  # noqa: E402

_CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": dict(
        architecture="qwen2",
        n_layers=24,
        n_embd=896,
        n_heads=14,
        n_kv_heads=2,
        head_dim=64,
        n_ff=4864,
        n_vocab=151936,
        tied_embeddings=True,
        base=1e6,
        norm_eps=1e-6,
        context_length=32768,
    ),
    "qwen3-0.6b": dict(
        architecture="qwen3",
        n_layers=28,
        n_embd=1024,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        n_ff=3072,
        n_vocab=151936,
        tied_embeddings=True,
        base=1e6,
        norm_eps=1e-6,
        context_length=40960,
    ),
    "llama-3.2-1b": dict(
        architecture="llama",
        n_layers=16,
        n_embd=2048,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        n_ff=8192,
        n_vocab=128256,
        tied_embeddings=True,
        base=5e5,
        norm_eps=1e-5,
        context_length=131072,
        freq_factors=dict(factor=32.0, low=1.0, high=4.0, original_context=8192),
    ),
    "llama-3-8b": dict(
        architecture="llama",
        n_layers=32,
        n_embd=4096,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        n_ff=14336,
        n_vocab=128256,
        tied_embeddings=False,
        base=5e5,
        norm_eps=1e-5,
        context_length=8192,
    ),
    "small": dict(
        architecture="llama",
        n_layers=8,
        n_embd=512,
        n_heads=8,
        n_kv_heads=4,
        head_dim=64,
        n_ff=1536,
        n_vocab=32000,
        tied_embeddings=False,
        base=1e4,
        norm_eps=1e-5,
        context_length=4096,
    ),
}

# Type -> the number llama.cpp writes as general.file_type.
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}

# What takes the place of a format whose blocks do not divide a tensor's rows.
_FALLBACK = {QuantType.Q4_K: QuantType.Q5_0, QuantType.Q6_K: QuantType.Q8_0}


def choose_types(file_type: str, config: ModelConfig) -> TypeChooser:
    """The format of each matrix in a file of this type."""
    base = QuantType["Q4_K" if file_type == "Q4_K_M" else file_type]
    is_output = {"output.weight", "token_embd.weight" if config.tied_embeddings else "output.weight"}

    def choose(name: str, shape: tuple[int, ...]) -> QuantType:
        chosen = base
        if name in is_output and file_type in ("Q4_0", "Q4_K_M"):
            chosen = QuantType.Q6_K
        elif file_type == "Q4_K_M" and name.endswith(("attn_v.weight", "ffn_down.weight")):
            chosen = QuantType.Q6_K if _use_more_bits(int(name.split(".")[1]), config.n_layers) else base
        return chosen if shape[1] % chosen.block_elements == 0 else _FALLBACK[chosen]

    return choose


def _use_more_bits(layer: int, n_layers: int) -> bool:
    return layer < n_layers // 8 or layer >= 7 * n_layers // 8 or (layer - n_layers // 8) % 3 == 2


def llama3_freq_factors(
    n_rot: int, base: float, *, factor: float, low: float, high: float, original_context: int
) -> np.ndarray:
    """Llama 3's divisors of the rotary frequencies, (n_rot / 2,), as Hugging Face's ``rope_type: llama3``."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, n_rot, 2) / n_rot)
    smooth = np.clip((original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def make_model(shape_name: str, file_type: str, path: Path, seed: int = 0) -> None:
    """Write the model; see the module's description."""
    shape = dict(SHAPES[shape_name])
    base, eps, scaling = shape.pop("base"), shape.pop("norm_eps"), shape.pop("freq_factors", None)
    config = tiny_config(
        **shape, value_dim=shape["head_dim"], name=f"{shape_name} random", norm_eps=eps, rope={"base": base}
    )
    factors = llama3_freq_factors(shape["head_dim"], base, **scaling) if scaling else None
    names = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    names += [f"<|reserved_{i}|>" for i in range(256 - len(names))]
    pre = "llama-bpe" if config.architecture == "llama" else "qwen2"
    write_model(
        path,
        config,
        choose_types(file_type, config),
        seed=seed,
        vocabulary=large_vocabulary(config.n_vocab, names, seed, pre=pre, chat_template=_CHATML),
        freq_factors=factors,
        metadata={"general.file_type": FILE_TYPES[file_type], "general.quantization_version": 2},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=FILE_TYPES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    make_model(arguments.shape, arguments.type, arguments.path, arguments.seed)
    size = arguments.path.stat().st_size
    print(f"{arguments.path}: {size / 2**20:.0f} MiB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
