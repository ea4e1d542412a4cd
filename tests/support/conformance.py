"""The conformance kit: small models, each with the logits that llama.cpp computes for its weights.

``tests/data/conformance`` holds a part of the kit; the whole of it is used where it lies next to the
repository. How close to come is said in the kit's README.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from support.stages import relative_error

from redshard.loader.gguf.quant_types import QuantType

_ROOT = Path(__file__).parents[2]
OWN_KIT = _ROOT / "tests" / "data" / "conformance"
_KITS = (_ROOT.parent / "shared" / "conformance", OWN_KIT)
_MODELS = {"llama", "llama-rope-freqs", "qwen2", "qwen3"}


def kit(types: Iterable[QuantType]) -> list[Path]:
    """The files there are whose matrices are of these types."""
    formats = {quant_type.name.lower() for quant_type in types}
    files = {path.name: path for folder in _KITS for path in folder.glob("*.gguf")}
    return [
        files[name]
        for name in sorted(files)
        if name.split(".")[0] in _MODELS and name.split(".")[1] in formats
    ]


class Reference:
    """What a file's logits must be: tokens int32 (n,), logits float32 (n, n_vocab)."""

    def __init__(self, path: Path) -> None:
        stored = np.load(path.with_suffix(".npz"))
        self.path = path
        self.tokens, self.logits = stored["tokens"].astype(np.int32), stored["logits"]
        # Matrices of such weights read activations that are not quantized.
        self.is_float = path.name.split(".")[1] in ("f32", "f16", "bf16")

    def check(self, ours: np.ndarray) -> None:
        """Hold logits of all tokens to the kit's tolerance."""
        assert relative_error(ours, self.logits) < (2e-3 if self.is_float else 3e-2)
        second, best = np.sort(self.logits, axis=1)[:, -2:].T
        clear = best - second > 0.1
        assert (ours.argmax(axis=1) == self.logits.argmax(axis=1))[clear].mean() >= 0.95
