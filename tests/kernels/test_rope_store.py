"""`rope_store` against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from support import native_ops, reference_ops
from support.native_ops import Guarded

import redshard._cpu as _cpu

MAX_POSITIONS = 50


def random_angles(rng: np.random.Generator, n_rot: int) -> np.ndarray:
    angles = rng.uniform(0, 2 * np.pi, (MAX_POSITIONS, n_rot // 2))
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


@pytest.mark.parametrize("neox", [False, True], ids=["pairs", "neox"])
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "n_rot"),
    [(64, 64, 64), (80, 80, 32), (96, 128, 96), (128, 100, 128), (6, 5, 2)],
)
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "n_tokens"), [(1, 1, 1), (6, 2, 33)])
def test_rope_store(
    runtime: _cpu.Runtime,
    rng: np.random.Generator,
    head_dim: int,
    value_dim: int,
    n_rot: int,
    n_heads: int,
    n_kv_heads: int,
    n_tokens: int,
    norms: bool,
    neox: bool,
) -> None:
    n_blocks, block_size = 7, 16
    q = rng.standard_normal((n_tokens, n_heads, head_dim), np.float32)
    k = rng.standard_normal((n_tokens, n_kv_heads, head_dim), np.float32)
    v = rng.standard_normal((n_tokens, n_kv_heads, value_dim), np.float32)
    q_norm, k_norm = rng.uniform(0.5, 2, (2, head_dim)).astype(np.float32) if norms else (None, None)
    rotary = random_angles(rng, n_rot)
    positions = rng.integers(0, MAX_POSITIONS, n_tokens).astype(np.int32)
    slots = rng.permutation(n_blocks * block_size)[:n_tokens].astype(np.int32)
    turned = Guarded.holding(q)
    k_cache = Guarded((n_blocks, n_kv_heads, block_size, head_dim), np.float16)
    v_cache = Guarded((n_blocks, n_kv_heads, block_size, value_dim), np.float16)

    native_ops.rope_store(
        runtime,
        turned,
        k,
        v,
        k_cache,
        v_cache,
        positions=positions,
        slots=slots,
        rotary=rotary,
        neox=neox,
        q_norm=q_norm,
        k_norm=k_norm,
    )

    if q_norm is not None and k_norm is not None:
        q, k = reference_ops.rms_norm(q, q_norm, 1e-6), reference_ops.rms_norm(k, k_norm, 1e-6)
    angles = rotary[positions]
    np.testing.assert_allclose(turned.checked(), reference_ops.rotate(q, angles, neox), rtol=1e-5, atol=3e-6)
    places = np.divmod(slots, block_size)
    stored_keys = k_cache.checked()[places[0], :, places[1]]
    stored_values = v_cache.checked()[places[0], :, places[1]]
    np.testing.assert_allclose(stored_keys, reference_ops.rotate(k, angles, neox), rtol=2**-10, atol=4e-6)
    np.testing.assert_array_equal(stored_values, v.astype(np.float16))  # rounded to nearest even
    for cache in (k_cache.array, v_cache.array):
        assert np.isnan(cache).sum() == cache.size - n_tokens * n_kv_heads * cache.shape[3]


def test_every_float16_is_reached_and_rounded_to_nearest_even(runtime: _cpu.Runtime) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    beyond = np.array([65519.99, 65520, 1e9, np.inf, np.nan], np.float32)
    near = np.concatenate([np.nextafter(between, np.float32(0)), np.nextafter(between, np.float32(1e9))])
    positive = np.concatenate([halves, between, near, beyond])
    v = np.concatenate([positive, -positive])
    v = np.pad(v, (0, -v.size % 61)).reshape(-1, 1, 61)
    n_tokens = len(v)
    k_cache, v_cache = Guarded((n_tokens, 1, 1, 2), np.float16), Guarded((n_tokens, 1, 1, 61), np.float16)
    native_ops.rope_store(
        runtime,
        Guarded.holding(np.zeros((n_tokens, 1, 2), np.float32)),
        np.zeros((n_tokens, 1, 2), np.float32),
        v,
        k_cache,
        v_cache,
        positions=np.zeros(n_tokens, np.int32),
        slots=np.arange(n_tokens, dtype=np.int32),
        rotary=np.ones((1, 1, 2), np.float32),
        neox=False,
    )
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(v_cache.checked().reshape(v.shape), v.astype(np.float16))
