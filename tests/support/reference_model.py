"""A plain forward pass in float64 over dequantized weights, to check stages against.

It shares nothing with the code it checks: the file is read by the gguf package, and every formula is written
out once, for all positions of one sequence at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


class ReferenceModel:
    """A llama, qwen2 or qwen3 model read whole into float64.

    Args:
        path: the GGUF file.
        cache_dtype: keys and values are rounded to this type, as by a cache that holds it.
    """

    def __init__(self, path: Path, cache_dtype: type = np.float64) -> None:
        self._cache_dtype = cache_dtype
        reader = gguf.GGUFReader(path)
        self._metadata = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture = self._metadata["general.architecture"]
        self._weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        n_layers = self._key("block_count")
        # One number for all layers, or one for each.
        self.n_heads = np.broadcast_to(self._key("attention.head_count"), n_layers)
        self.n_kv_heads = np.broadcast_to(self._key("attention.head_count_kv", self.n_heads), n_layers)
        n_embd = self._key("embedding_length")
        self.head_dim = self._key("attention.key_length", n_embd // self.n_heads[0])
        self.value_dim = self._key("attention.value_length", n_embd // self.n_heads[0])
        self.n_rot = self._key("rope.dimension_count", self.head_dim)
        self.eps = self._key("attention.layer_norm_rms_epsilon")

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of every position of one sequence: (n,) token ids to (n, n_vocab) float64."""
        x = self._weights["token_embd.weight"][tokens]
        cosine, sine = self._rotary(np.arange(len(tokens)))
        for layer in range(self._key("block_count")):
            x = x + self._attention(layer, x, cosine, sine)
            x = x + self._feed_forward(layer, x)
        x = _rms_norm(x, self._weights["output_norm.weight"], self.eps)
        output = "output" if "output.weight" in self._weights else "token_embd"
        return self._linear(output, x)

    def _attention(self, layer: int, x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
        n, n_heads, n_kv_heads = len(x), self.n_heads[layer], self.n_kv_heads[layer]
        h = _rms_norm(x, self._weights[f"blk.{layer}.attn_norm.weight"], self.eps)
        q = self._linear(f"blk.{layer}.attn_q", h).reshape(n, n_heads, self.head_dim)
        k = self._linear(f"blk.{layer}.attn_k", h).reshape(n, n_kv_heads, self.head_dim)
        v = self._linear(f"blk.{layer}.attn_v", h).reshape(n, n_kv_heads, self.value_dim)
        if f"blk.{layer}.attn_q_norm.weight" in self._weights:
            q = _rms_norm(q, self._weights[f"blk.{layer}.attn_q_norm.weight"], self.eps)
            k = _rms_norm(k, self._weights[f"blk.{layer}.attn_k_norm.weight"], self.eps)
        q, k = self._rotate(q, cosine, sine), self._rotate(k, cosine, sine)
        k, v = (values.astype(self._cache_dtype).astype(np.float64) for values in (k, v))
        group = n_heads // n_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1)
        return self._linear(f"blk.{layer}.attn_output", mixed)

    def _feed_forward(self, layer: int, x: np.ndarray) -> np.ndarray:
        h = _rms_norm(x, self._weights[f"blk.{layer}.ffn_norm.weight"], self.eps)
        gate = self._linear(f"blk.{layer}.ffn_gate", h)
        return self._linear(
            f"blk.{layer}.ffn_down", gate / (1 + np.exp(-gate)) * self._linear(f"blk.{layer}.ffn_up", h)
        )

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self._weights[f"{name}.weight"].T + self._weights.get(f"{name}.bias", 0.0)

    def _rotate(self, heads: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
        turned = heads.copy()
        half = self.n_rot // 2
        if self.architecture == "llama":
            first, second = slice(0, self.n_rot, 2), slice(1, self.n_rot, 2)
        else:
            first, second = slice(0, half), slice(half, self.n_rot)
        a, b = heads[..., first], heads[..., second]
        turned[..., first] = a * cosine[:, None] - b * sine[:, None]
        turned[..., second] = a * sine[:, None] + b * cosine[:, None]
        return turned

    def _rotary(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines, (n, n_rot / 2) each; yarn as in https://arxiv.org/abs/2309.00071."""
        base = self._key("rope.freq_base", 10000.0)
        pairs = np.arange(self.n_rot // 2)
        frequencies = base ** (-2.0 * pairs / self.n_rot)
        if "rope_freqs.weight" in self._weights:
            frequencies = frequencies / self._weights["rope_freqs.weight"]
        factor = self._key("rope.scaling.factor", 1.0)
        magnitude = self._key("rope.scaling.attn_factor", 1.0)
        match self._key("rope.scaling.type", "none"):
            case "linear":
                frequencies = frequencies / factor
            case "yarn":
                context = self._key("rope.scaling.original_context_length")

                def pair_turning(rotations: float) -> float:
                    return self.n_rot * np.log(context / (rotations * 2 * np.pi)) / (2 * np.log(base))

                low = max(np.floor(pair_turning(32.0)), 0)
                high = min(np.ceil(pair_turning(1.0)), self.n_rot - 1)
                stretched = np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
                frequencies = frequencies * (1 - stretched) + frequencies / factor * stretched
                magnitude *= 1 + 0.1 * np.log(factor)
        angles = positions[:, None] * frequencies
        return magnitude * np.cos(angles), magnitude * np.sin(angles)

    def _key(self, name: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise KeyError(f"{self.architecture}.{name}")
        return value


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
