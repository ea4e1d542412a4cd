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
    chunks.

    matched: the stop string found, None so far.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that cannot belong to a stop string; nothing once one was found."""
        if self.matched is not None:
            return ""
        self._held += text
        begins = ((self._held.find(stop), stop) for stop in self._stops)
        found = [(begin + len(stop), begin, stop) for begin, stop in begins if begin >= 0]
        if found:
            _, keep, self.matched = min(found)
        else:
            keep = len(self._held) - self._possible_beginning()
        certain, self._held = self._held[:keep], self._held[keep:]
        return certain

    def flush(self) -> str:
        """What was held back at the end of the stream; nothing if a stop string was found."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        ends = (self._held[len(self._held) - length :] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
