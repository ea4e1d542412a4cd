"""One request's tokens as text, up to its first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from redshard.loader.tokenizer.detokenizer import StopMatcher, StreamDecoder
from redshard.loader.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Gives out text that is certain: whole characters, and nothing that may belong to a stop string.

    Special tokens are no part of the text, but stop strings may name them, alone or among other text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; the text ends before it."""
        return self._matcher.matched is not None

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if self._tokenizer.is_special(token):
            return self._matcher.push(
                self._tokenizer.token_bytes(token).decode(errors="replace"), hidden=True
            )
        return self._matcher.push(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, at the end of the tokens."""
        return self._matcher.push(self._decoder.flush()) + self._matcher.flush()
