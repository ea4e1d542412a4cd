"""Trained weights on disk, between training, further training and export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def save_weights(weights: Mapping[str, np.ndarray], directory: Path) -> None:
    """Writes the weights as float16, in two archives so that each stays under 16 MiB."""
    names = sorted(weights)
    for part, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        arrays = {name: weights[name].astype(np.float16) for name in half}
        np.savez(directory / f"weights{part}.npz", **arrays)


def load_weights(directory: Path) -> dict[str, np.ndarray]:
    """The float16 weights that training wrote, by name."""
    weights: dict[str, np.ndarray] = {}
    for part in sorted(directory.glob("weights*.npz")):
        with np.load(part) as arrays:
            weights.update(arrays)
    if not weights:
        raise SystemExit(f"{directory}: no weights*.npz here; train first, or name another directory")
    return weights
