"""What a task of the corpus makes, and the split into training and held-out questions."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from redshard.cluster.commands.demo_questions import DemoQuestion

#: Encloses a stretch of a reply that the tokenizer encodes letter by letter (see `tokens.py`).
LETTER_BY_LETTER = "\0"

_HELD_OUT_SHARE = 10


@dataclass(frozen=True, slots=True)
class Example:
    """One question with the reply to learn; `held_out` says on which side of the split it lies."""

    question: DemoQuestion
    reply: str
    held_out: bool

    @property
    def plain_reply(self) -> str:
        """The reply as a reader sees it."""
        return self.reply.replace(LETTER_BY_LETTER, "")


def is_held_out(*content: object) -> bool:
    """Whether questions about `content` are kept from training: one content in ten, by its CRC-32.

    Content is what a question is about (the sorted operands, the word, the date), never how it is worded.
    """
    return crc32(repr(content).encode()) % _HELD_OUT_SHARE == 0


def spell(word: str) -> str:
    """`word` with a space before it, to be encoded letter by letter."""
    return f"{LETTER_BY_LETTER} {word}{LETTER_BY_LETTER}"
