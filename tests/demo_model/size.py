"""The demo model's hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Hyperparameters; the defaults are the model that ships (9.3 million weights)."""

    layers: int = 10
    width: int = 256
    heads: int = 6
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 768
    vocabulary: int = 3072
    context: int = 1024
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6


SHIPPED = Size()
#: Small enough to try the whole pipeline on two CPU cores.
TINY = Size(layers=3, width=128, heads=4, kv_heads=2, head_size=32, feed_forward=256)
