"""SentencePiece's precompiled character map (`tokenizer.ggml.precompiled_charsmap`).

A double-array trie of UTF-8 sequences, each with a replacement. Layout: 4 bytes of trie size, the trie in
32-bit units (darts-clone, https://github.com/s-yata/darts-clone), then NUL-terminated replacements.
"""

from __future__ import annotations

import re

import numpy as np

from redshard.loader.tokenizer.vocabulary import TokenizerError

_HAS_VALUE = 1 << 8
_VALUE = (1 << 31) - 1
_LABEL = (1 << 31) | 0xFF


class Charsmap:
    """Replaces, from the left, the longest sequence that the map knows.

    An empty map changes nothing.

    Raises:
        TokenizerError: the map is broken.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if data and (len(data) < 4 or size % 4 or not 0 < size < len(data) - 4 or data[-1]):
            raise TokenizerError(
                f"tokenizer.ggml.precompiled_charsmap is broken: {len(data)} bytes with a trie of {size}"
            )
        self._units: list[int] = np.frombuffer(data[4 : 4 + size], "<u4").tolist()
        self._replacements = data[4 + size :]
        inert = bytes(byte for byte in range(1, 128) if self._units and self._is_inert(byte))
        self._inert_run = re.compile(b"[" + re.escape(inert or b"\0") + rb"]+(?=[\x00-\x7f]|\Z)")

    def apply(self, text: str) -> str:
        """The normalized text."""
        if not self._units:
            return text
        data = text.encode()
        out: list[bytes] = []
        start = 0
        while start < len(data):
            if run := self._inert_run.match(data, start):
                out.append(run[0])
                start = run.end()
                continue
            end, value = self._longest(data, start)
            if value is None:
                end = start + _character_length(data[start])
                out.append(data[start:end])
            else:
                out.append(self._replacements[value : self._replacements.find(b"\0", value)])
            start = end
        return b"".join(out).decode(errors="replace")

    def _is_inert(self, byte: int) -> bool:
        """Whether no key is this ASCII character, or begins with it and another ASCII character."""
        place = _children(self._units[0]) ^ byte
        unit = self._unit(place)
        if unit & _LABEL != byte:
            return True
        base = place ^ _children(unit)
        return not unit & _HAS_VALUE and all(
            self._unit(base ^ next_) & _LABEL != next_ for next_ in range(1, 128)
        )

    def _unit(self, place: int) -> int:
        return self._units[place] if place < len(self._units) else 0

    def _longest(self, data: bytes, start: int) -> tuple[int, int | None]:
        """End and value of the longest key that `data` has at `start`; no value if there is none."""
        place = _children(self._units[0])
        end, value = start, None
        for position in range(start, len(data)):
            place ^= data[position]
            unit = self._unit(place)
            if unit & _LABEL != data[position] or not data[position]:
                break
            place ^= _children(unit)
            if unit & _HAS_VALUE:
                end, value = position + 1, self._unit(place) & _VALUE
        return end, value


def _children(unit: int) -> int:
    return (unit >> 10) << ((unit & (1 << 9)) >> 6)


def _character_length(lead: int) -> int:
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
