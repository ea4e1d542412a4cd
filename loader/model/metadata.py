"""Typed access to a model's hyperparameters in the metadata of its file."""

from __future__ import annotations

from typing import Any

import numpy as np

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile


class Keys:
    """The metadata below ``ARCHITECTURE.``; a key without a default must be there.

    All methods raise GGUFError for a key that is missing or of another type.

    Attributes:
        path: of the file; architecture: the value of ``general.architecture``.
        n_layers: ``block_count``.
    """

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.path = file.path
        self.architecture = architecture
        self._metadata = file.metadata
        self.n_layers = self.integer("block_count")
        # Every layer has tensors; a number that is made up must not fill the memory.
        if not 0 < self.n_layers <= len(file.tensors):
            expected = f"from 1 to {len(file.tensors)}, the number of tensors"
            raise self._wrong("block_count", expected, self.n_layers)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if type(value) is not int:
            raise self._wrong(key, "an integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise self._wrong(key, "a number", value)
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def by_layer(self, key: str, default: list[int] | None = None, least: int = 0) -> list[int]:
        """An integer of at least `least` for each layer, of a key that holds one for all or one for each."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "iu" or len(value) != self.n_layers:
                raise self._wrong(key, f"one integer or {self.n_layers}, one for each layer", value)
            numbers = [int(one) for one in value]
        else:
            numbers = default if default and value is default else [self.integer(key)] * self.n_layers
        if min(numbers) < least:
            raise self._wrong(key, f"at least {least}", value)
        return numbers

    def _value(self, key: str, default: Any) -> Any:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise GGUFError(self.path, f"metadata key {self.architecture}.{key} is missing")
        return value

    def _wrong(self, key: str, expected: str, value: object) -> GGUFError:
        return GGUFError(self.path, f"{self.architecture}.{key} must be {expected}, found {value!r:.40}")
