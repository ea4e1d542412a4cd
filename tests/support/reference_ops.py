"""Every operation of `KERNEL_ARGUMENTS` in numpy, in float64 except where bits are promised.

Shapes and meanings are those of kernels/common/arguments.h; functions see whole arrays, no step, no pointers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

QUANT_BLOCK = 32
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows in 8-bit blocks of 32: int8 (..., width), float32 (..., width / 32) twice."""

    quants: np.ndarray
    scales: np.ndarray
    sums: np.ndarray

    def values(self) -> np.ndarray:
        """What the quants stand for, float64 (..., width)."""
        return self.quants * np.repeat(self.scales.astype(np.float64), QUANT_BLOCK, axis=-1)


def quantize(values: np.ndarray) -> Quantized:
    """The 8-bit form of float32 rows, to the bit: see kernels/cpu/quantize.h.

    Blocks below 2^-100 are zeros; those with a NaN or an infinity have NaN for scale and sum, and no quants.
    """
    blocks = values.astype(np.float32).reshape(*values.shape[:-1], -1, QUANT_BLOCK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    finite = np.isfinite(blocks).all(axis=-1, keepdims=True)
    kept = finite & (largest >= np.float32(2.0**-100))
    divisor = np.where(kept, largest, np.float32(1))
    with np.errstate(invalid="ignore"):
        quants = np.rint(np.where(kept, blocks, np.float32(0)) * (np.float32(127) / divisor))
    without_quants = np.where(finite, np.float32(0), np.float32(np.nan))
    scales = np.where(kept, largest / np.float32(127), without_quants)[..., 0]
    sums = scales * quants.sum(axis=-1).astype(np.float32)
    return Quantized(quants.astype(np.int8).reshape(values.shape), scales, sums)


def embed(table: np.ndarray, token_ids: np.ndarray, scale: float) -> np.ndarray:
    """Rows of a dequantized table (n_vocab, width)."""
    return table[token_ids].astype(np.float64) * scale


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Over the last axis. B. Zhang, R. Sennrich: Root Mean Square Layer Normalization, 2019."""
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def matmul(x: np.ndarray | Quantized, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Product x w^T + bias for dequantized w (n_rows, width); quantized w see quantized activations."""
    seen = x.values() if isinstance(x, Quantized) else x.astype(np.float64)
    return seen @ w.T.astype(np.float64) + (0 if bias is None else bias)


def swiglu(
    x: np.ndarray | Quantized,
    gate: np.ndarray,
    up: np.ndarray,
    gate_bias: np.ndarray | None = None,
    up_bias: np.ndarray | None = None,
) -> np.ndarray:
    """N. Shazeer: GLU Variants Improve Transformer, 2020."""
    gated = matmul(x, gate, gate_bias)
    return gated / (1 + np.exp(-gated)) * matmul(x, up, up_bias)


def rotate(x: np.ndarray, angles: np.ndarray, neox: bool) -> np.ndarray:
    """Rotary embedding of heads (n_tokens, n_heads, head_dim). J. Su et al.: RoFormer, 2021.

    Args:
        x: the heads.
        angles: (n_tokens, n_rot / 2, 2), cosine and sine of each pair.
        neox: pairs are (i, i + n_rot / 2) rather than (2 i, 2 i + 1).
    """
    n_pairs = angles.shape[1]
    first, second = (
        (slice(0, n_pairs), slice(n_pairs, 2 * n_pairs))
        if neox
        else (slice(0, 2 * n_pairs, 2), slice(1, 2 * n_pairs, 2))
    )
    cosine, sine = angles[:, None, :, 0].astype(np.float64), angles[:, None, :, 1].astype(np.float64)
    out = x.astype(np.float64)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first] = a * cosine - b * sine
    out[..., second] = a * sine + b * cosine
    return out


def attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, scale: float) -> np.ndarray:
    """One token's heads over its own sequence.

    Args:
        q: (n_heads, head_dim).
        keys: (n_positions, n_kv_heads, head_dim), as the cache holds them.
        values: (n_positions, n_kv_heads, value_dim).
        position: of the token; it sees the positions up to its own.
        scale: of the scores.

    Returns:
        (n_heads, value_dim) float64.
    """
    group = len(q) // keys.shape[1]
    seen_keys = np.repeat(keys[: position + 1].astype(np.float64), group, axis=1)
    seen_values = np.repeat(values[: position + 1].astype(np.float64), group, axis=1)
    scores = np.einsum("hd,phd->hp", q.astype(np.float64), seen_keys) * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hp,phd->hd", weights / weights.sum(axis=1, keepdims=True), seen_values)


@dataclass(frozen=True, slots=True)
class Sampling:
    """`SamplingRow`, and the row's `Adjustment` entries as (token, seen, generated, bias)."""

    seed: int = 0
    draw: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    adjustments: list[tuple[int, int, int, float]] = field(default_factory=list)
    newest: int | None = None  # sampled last, and not yet counted in the adjustments


def adjust(logits: np.ndarray, row: Sampling) -> np.ndarray:
    """Bias first, then the penalties, in float32."""
    out = logits.astype(np.float32)
    entries = {token: (seen, generated, bias) for token, seen, generated, bias in row.adjustments}
    if row.newest is not None:
        seen, generated, bias = entries.get(row.newest, (0, 0, 0.0))
        entries[row.newest] = seen + 1, generated + 1, bias
    for token, (seen, generated, bias) in entries.items():
        logit = out[token] + np.float32(bias)
        if seen > 0:
            penalty = np.float32(row.repeat_penalty)
            logit = logit / penalty if logit > 0 else logit * penalty
        if generated > 0:
            presence, frequency = np.float32(row.presence_penalty), np.float32(row.frequency_penalty)
            logit -= presence + frequency * np.float32(generated)
        out[token] = logit
    return out


def distribution(logits: np.ndarray, row: Sampling) -> np.ndarray:
    """Probabilities (n_vocab,) that a token is drawn with, for adjusted logits; NaN counts as -infinity."""
    logits = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    order = np.lexsort((np.arange(len(logits)), -logits))  # falling logit, then rising id
    if row.temperature <= 0 or not np.isfinite(logits[order[0]]):
        return np.eye(1, len(logits), order[0])[0]
    weights = np.exp(logits[order] - logits[order[0]])
    n_kept = row.top_k if 0 < row.top_k < len(order) else len(order)
    if row.top_p < 1:
        cumulated = np.cumsum(weights[:n_kept])
        n_kept = min(n_kept, 1 + int(np.searchsorted(cumulated, row.top_p * cumulated[-1])))
    if row.min_p > 0:
        n_kept = min(n_kept, max(1, int((weights >= row.min_p).sum())))
    kept = order[:n_kept]
    out = np.zeros(len(logits))
    out[kept] = np.exp((logits[kept] - logits[order[0]]) / max(row.temperature, 1e-6))
    return out / out.sum()


def uniform(seed: int, draw: int) -> float:
    """The random number in [0, 1) of a request's draw: SplitMix64's finalizer, of seed, then of draw."""
    return (_mix((_mix(seed) + draw * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
    return z ^ z >> 31


def sample(logits: np.ndarray, row: Sampling) -> int:
    """The token drawn from raw logits (n_vocab,): the first whose cumulated probability passes `uniform`."""
    probabilities = distribution(adjust(logits, row), row)
    cumulated = np.cumsum(probabilities)
    drawn = int(np.searchsorted(cumulated, uniform(row.seed, row.draw) * cumulated[-1], side="right"))
    return min(drawn, int(np.flatnonzero(probabilities)[-1]))


def logprobs(logits: np.ndarray) -> np.ndarray:
    """Natural logarithm of softmax(raw logits), float64 (n_vocab,); NaN counts as -infinity."""
    logits = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    largest = logits.max()
    return logits - largest - math.log(np.exp(logits - largest).sum())
