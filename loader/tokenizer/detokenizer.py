"""From a stream of token ids to text that is certain: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from redshard.loader.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes generated tokens one by one, never splitting a character.

    What `push` and `flush` return adds up to `tokenizer.decode(ids, continuation=True)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; empty while a character is incomplete.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Cuts a stream of text before the first stop string, wherever the chunks divide it.

    The first is the one that ends first, and of those the longest, so the result does not depend on the
    chunks. Each character costs as many steps as there are stop strings that it begins or goes on with
    (Knuth, Morris and Pratt, Fast Pattern Matching in Strings, 1977), whatever their number and length.

    matched: the stop string found, None so far.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._failures = {stop: _failures(stop) for stop in stops}
        self._by_first: dict[str, list[str]] = {}
        for stop in self._failures:
            self._by_first.setdefault(stop[0], []).append(stop)
        self._begun: dict[str, int] = {}  # how much of each stop string the text so far ends with
        self._held = ""
        self._hidden = bytearray()  # for each held character whether it is to be seen
        self.matched: str | None = None

    def push(self, text: str, *, hidden: bool = False) -> str:
        """The text that cannot belong to a stop string; nothing once one was found.

        hidden: the text counts for stop strings, but is never given out.
        """
        if self.matched is not None:
            return ""
        start = len(self._held)
        self._held += text
        self._hidden += bytes([hidden]) * len(text)
        for place, character in enumerate(text, start + 1):
            if found := self._advance(character):
                self.matched = max(found, key=len)
                return self._give_out(place - len(self.matched))
        return self._give_out(len(self._held) - max(self._begun.values(), default=0))

    def flush(self) -> str:
        """What was held back at the end of the stream; nothing if a stop string was found."""
        return "" if self.matched is not None else self._give_out(len(self._held))

    def _advance(self, character: str) -> list[str]:
        """Take one more character; the stop strings that end with it."""
        found, begun = [], {}
        for stop in (*self._begun, *self._by_first.get(character, ())):
            if stop in begun:
                continue
            length, failures = self._begun.get(stop, 0), self._failures[stop]
            while length and stop[length] != character:
                length = failures[length - 1]
            length += stop[length] == character
            if length == len(stop):
                found.append(stop)
            elif length:
                begun[stop] = length
        self._begun = begun
        return found

    def _give_out(self, n: int) -> str:
        """What is to be seen of the first `n` held characters, which are held no longer."""
        text, hidden = self._held[:n], self._hidden[:n]
        self._held, self._hidden = self._held[n:], self._hidden[n:]
        if any(hidden):
            return "".join(character for character, hide in zip(text, hidden, strict=True) if not hide)
        return text


def _failures(stop: str) -> list[int]:
    """For each beginning of a string, the length of its longest proper end that begins the string."""
    lengths, length = [0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = lengths[length - 1]
        length += stop[length] == character
        lengths.append(length)
    return lengths
