"""The rotary table against the recurrences of ggml's rope, written out one element at a time in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from redshard.loader.model.configuration import RopeConfig
from redshard.loader.model.rotary import rotary_table


def make_rope(**changes: Any) -> RopeConfig:
    values: dict[str, Any] = dict(
        style="norm",
        n_rot=64,
        base=10000.0,
        scaling="none",
        factor=1.0,
        original_context=512,
        attention_factor=1.0,
    )
    return RopeConfig(**{**values, **changes})


def ggml_angle_and_scale(
    rope: RopeConfig, position: int, pair: int, freq_factor: float
) -> tuple[float, float]:
    """``ggml_rope_cache_init`` and ``rope_yarn`` of ggml-cpu, with the parameters llama.cpp passes."""
    theta = float(position)
    for _ in range(pair):
        theta *= rope.base ** (-2.0 / rope.n_rot)
    theta_extrap = theta / freq_factor
    freq_scale = 1.0 / rope.factor
    theta_interp = freq_scale * theta_extrap
    if rope.scaling != "yarn":
        return theta_interp, rope.attention_factor

    def corr_dim(n_rotations: float) -> float:
        return (
            rope.n_rot
            * math.log(rope.original_context / (n_rotations * 2 * math.pi))
            / (2 * math.log(rope.base))
        )

    low, high = (
        max(0, math.floor(corr_dim(rope.beta_fast))),
        min(rope.n_rot - 1, math.ceil(corr_dim(rope.beta_slow))),
    )
    y = (pair - low) / max(0.001, high - low)
    ramp_mix = 1 - min(1, max(0, y))
    theta = theta_interp * (1 - ramp_mix) + theta_extrap * ramp_mix
    # llama-context.cpp first divides by what rope_yarn multiplies by.
    get_mscale = 1.0 if rope.factor <= 1.0 else 0.1 * math.log(rope.factor) + 1.0
    context_factor = get_mscale * (1.0 / (1.0 + 0.1 * math.log(rope.factor))) * rope.attention_factor
    return theta, context_factor * (1.0 + 0.1 * math.log(1.0 / freq_scale))


@pytest.mark.parametrize(
    "rope",
    [
        make_rope(),
        make_rope(n_rot=2),
        make_rope(n_rot=80, base=500000.0),
        make_rope(scaling="linear", factor=4.0),
        make_rope(scaling="linear", factor=0.5, attention_factor=1.25),
        make_rope(scaling="yarn", factor=4.0),
        make_rope(scaling="yarn", factor=4.0, original_context=32768, base=1000000.0, n_rot=128),
        make_rope(scaling="yarn", factor=32.0, original_context=4096, attention_factor=0.7, base=150000.0),
        make_rope(scaling="yarn", factor=0.5),
        make_rope(scaling="yarn", factor=8.0, original_context=16, beta_fast=16.0, beta_slow=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_factors", [False, True])
def test_table_follows_ggml(rope: RopeConfig, with_factors: bool) -> None:
    factors = np.random.default_rng(5).uniform(1.0, 8.0, rope.n_rot // 2).astype(np.float32)
    n_positions = 131
    table = rotary_table(rope, n_positions, factors if with_factors else None)

    expected = np.empty((n_positions, rope.n_rot // 2, 2))
    for position in range(n_positions):
        for pair in range(rope.n_rot // 2):
            divisor = float(factors[pair]) if with_factors else 1.0
            angle, scale = ggml_angle_and_scale(rope, position, pair, divisor)
            expected[position, pair] = math.cos(angle) * scale, math.sin(angle) * scale
    assert table.dtype == np.float32
    assert table.shape == expected.shape
    np.testing.assert_allclose(table, expected, atol=2e-7, rtol=2e-7)


def test_long_tables_are_one_function_of_the_position() -> None:
    rope = make_rope(n_rot=8)
    long = rotary_table(rope, 10_001)
    np.testing.assert_array_equal(long[:700], rotary_table(rope, 700))
    np.testing.assert_allclose(long[10_000, 0], [math.cos(10_000), math.sin(10_000)], atol=1e-6)


def test_empty_table() -> None:
    assert rotary_table(make_rope(), 0).shape == (0, 32, 2)


def test_scaling_changes_the_table() -> None:
    plain = rotary_table(make_rope(), 100)
    for scaling in ("linear", "yarn"):
        assert not np.allclose(plain, rotary_table(make_rope(scaling=scaling, factor=4.0), 100), atol=1e-3)
