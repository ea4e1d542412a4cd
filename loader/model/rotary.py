"""Tables of cosines and sines for the rotary position embedding, made on the host.

RoPE: https://arxiv.org/abs/2104.09864; YaRN: https://arxiv.org/abs/2309.00071, with the ramp over whole
dimensions and the magnitude of ggml's ``rope_yarn``.
"""

from __future__ import annotations

import math

import numpy as np

from redshard.loader.model.configuration import RopeConfig

_POSITIONS_AT_ONCE = 4096


def rotary_bytes(rope: RopeConfig, n_positions: int) -> int:
    """Bytes of a table of so many positions."""
    return 4 * rope.n_rot * n_positions


def rotary_table(rope: RopeConfig, n_positions: int, freq_factors: np.ndarray | None = None) -> np.ndarray:
    """Cosine and sine of every position's rotations.

    Args:
        rope: the model's rotary embedding.
        n_positions: rows of the table, for positions 0 to n_positions - 1.
        freq_factors: (n_rot / 2,), divisors of the frequencies (the ``rope_freqs`` tensor of Llama 3).

    Returns:
        float32 (n_positions, n_rot / 2, 2), cosine first, scaled by the attention factor.
    """
    frequencies = _frequencies(rope, freq_factors)
    magnitude = _magnitude(rope)
    table = np.empty((n_positions, len(frequencies), 2), np.float32)
    # In pieces, because the float64 intermediates of a long context would outweigh the table.
    for start in range(0, n_positions, _POSITIONS_AT_ONCE):
        piece = table[start : start + _POSITIONS_AT_ONCE]
        angles = np.arange(start, start + len(piece), dtype=np.float64)[:, None] * frequencies
        piece[..., 0] = np.cos(angles) * magnitude
        piece[..., 1] = np.sin(angles) * magnitude
    return table


def _frequencies(rope: RopeConfig, freq_factors: np.ndarray | None) -> np.ndarray:
    """Radians per position of each pair, float64 (n_rot / 2,)."""
    pairs = np.arange(rope.n_rot // 2, dtype=np.float64)
    original = rope.base ** (-2 * pairs / rope.n_rot)
    if freq_factors is not None:
        original = original / freq_factors.astype(np.float64)
    stretched = original / rope.factor
    if rope.scaling != "yarn":
        return stretched
    low = max(0.0, math.floor(_pair_rotating(rope, rope.beta_fast)))
    high = min(rope.n_rot - 1.0, math.ceil(_pair_rotating(rope, rope.beta_slow)))
    kept = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
    return stretched * (1.0 - kept) + original * kept


def _pair_rotating(rope: RopeConfig, rotations: float) -> float:
    """The (fractional) pair that turns `rotations` times within the original context."""
    return (
        rope.n_rot * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))
    )


def _magnitude(rope: RopeConfig) -> float:
    if rope.scaling == "yarn" and rope.factor > 1.0:
        return rope.attention_factor * (1.0 + 0.1 * math.log(rope.factor))
    return rope.attention_factor
