"""Varied wording: templates with alternatives, and the small talk people wrap a question in."""

from __future__ import annotations

import re
from functools import cache
from random import Random

_ALTERNATIVES = re.compile(r"\[([^\]]*)\]")

_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeio]|u(?!ni|se))")

_OPENERS = (
    "Please ", "Hey, ", "Hi! ", "Hello, ", "Quick question: ", "Can you help me? ", "I have a question. ",
    "One more: ", "OK, ", "So, ", "Tell me: ", "I need help. ", "Question: ", "Now: ",
)  # fmt: skip
_CLOSERS = (" Thanks!", " Please.", " Thank you.", " Can you tell me?", " I need to know.")


@cache
def _parts(template: str) -> tuple[tuple[str, ...], ...]:
    pieces = _ALTERNATIVES.split(template)
    return tuple(tuple(piece.split("|")) if i % 2 else (piece,) for i, piece in enumerate(pieces))


def fill(rng: Random, template: str, **fields: object) -> str:
    """One reading of `template`: `[a|b]` is a choice, `{name}` a field."""
    text = "".join(part[0] if len(part) == 1 else rng.choice(part) for part in _parts(template))
    return text.format(**fields) if fields else text


def with_articles(text: str) -> str:
    """`text` with `an` for `a` before a vowel."""
    return _BEFORE_VOWEL.sub(r"\1n ", text)


def casual(rng: Random, question: str) -> str:
    """`question` as somebody in a hurry, or somebody polite, might type it."""
    if rng.random() < 0.2:
        opener = rng.choice(_OPENERS)
        goes_on = opener[-2] not in ".!?:"
        question = opener + (question[0].lower() + question[1:] if goes_on else question)
    if rng.random() < 0.08:
        question = question + rng.choice(_CLOSERS)
    if rng.random() < 0.12:
        question = question.lower()
    if rng.random() < 0.12:
        question = question.rstrip("?.")
    return question


def is_plain(question: str) -> bool:
    """Whether `question` is a whole sentence in good English with nothing put around it by `casual`."""
    wrapped = question.startswith(_OPENERS) or question.endswith(_CLOSERS)
    ordered = question.startswith(("Calculate", "Compute", "Work out")) and question[-1] == "?"
    uncounted = question.startswith("How much ") and not question.startswith("How much is ")
    whole = question[0].isupper() and question[-1] in "?."
    return whole and not wrapped and not ordered and not uncounted
