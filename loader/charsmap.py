"""SentencePiece's precompiled character map (`tokenizer.ggml.precompiled_charsmap`).

A double-array trie of UTF-8 sequences, each with a replacement. Layout: 4 bytes of trie size, the trie in
32-bit units (darts-clone, https://github.com/s-yata/darts-clone), then NUL-terminated replacements.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loader.vocabulary import TokenizerError

_HAS_LEAF = 1 << 8
_VALUE = (1 << 31) - 1
_LABEL = (1 << 31) | 0xFF


class Charsmap:
    """Replaces, from the left, the longest sequence that the map knows.

    Raises:
        TokenizerError: the map is broken.
    """

    def __init__(self, data: bytes) -> None:
        self._rules = _read_rules(data) if data else {}
        self._longest = max(map(len, self._rules), default=0)
        self._begins = {sequence[:2] for sequence in self._rules if len(sequence) > 1}
        self._table = {ord(sequence): text for sequence, text in self._rules.items() if len(sequence) == 1}

    def apply(self, text: str) -> str:
        """The normalized text."""
        out: list[str] = []
        start = plain = 0
        while start < len(text) - 1:
            if text[start : start + 2] in self._begins and (length := self._match(text, start)):
                out += text[plain:start].translate(self._table), self._rules[text[start : start + length]]
                start += length
                plain = start
            else:
                start += 1
        out.append(text[plain:].translate(self._table))
        return "".join(out)

    def _match(self, text: str, start: int) -> int:
        """Length of the longest rule of two or more characters at `start`, else 0."""
        lengths = range(min(self._longest, len(text) - start), 1, -1)
        return next((length for length in lengths if text[start : start + length] in self._rules), 0)


def _read_rules(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size % 4 or not 0 < size < len(data) - 4 or data[-1]:
        raise TokenizerError(
            f"tokenizer.ggml.precompiled_charsmap is broken: {len(data)} bytes with a trie of {size}"
        )
    units = np.frombuffer(data, np.uint32, size // 4, 4)
    replacements = data[4 + size :]
    return {
        sequence.decode(errors="replace"): _string_at(replacements, value)
        for sequence, value in _entries(units)
    }


def _string_at(data: bytes, begin: int) -> str:
    return data[begin : data.find(b"\0", begin)].decode(errors="replace")


def _entries(units: np.ndarray) -> Iterator[tuple[bytes, int]]:
    """Every key of the trie with its value, level by level."""
    labels = np.arange(1, 256, dtype=np.uint32)
    bases = _children(units[:1])
    keys = [b""]
    seen = np.zeros(len(units), dtype=bool)  # a broken trie may run in circles
    while keys:
        places = bases[:, None] ^ labels
        places[places >= len(units)] = 0
        parents, columns = np.nonzero((units[places] & _LABEL == labels) & ~seen[places])
        places = places[parents, columns]
        seen[places] = True
        keys = [keys[parent] + bytes([column + 1]) for parent, column in zip(parents, columns, strict=True)]
        bases = places ^ _children(units[places])
        has_leaf = (units[places] & _HAS_LEAF != 0) & (bases < len(units))
        for node in np.nonzero(has_leaf)[0]:
            yield keys[node], int(units[bases[node]]) & _VALUE


def _children(units: np.ndarray) -> np.ndarray:
    return (units >> np.uint32(10)) << ((units & np.uint32(1 << 9)) >> np.uint32(6))
