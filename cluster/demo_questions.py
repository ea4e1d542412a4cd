"""Questions for the demo model with their true answers, and the check of a reply."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question and what makes a reply to it right.

    `answer` is what the reply must end with, its final full stop aside; `mentions` is what it must contain. Either
    may be empty.
    """

    task: str
    prompt: str
    answer: str = ""
    mentions: tuple[str, ...] = ()


def is_right(question: DemoQuestion, reply: str) -> bool:
    """Whether `reply` is true: it ends with the answer as a whole word or number and mentions what it must."""
    text = reply.strip().rstrip(".!").lower()
    answer = question.answer.lower()
    if not text.endswith(answer) or not all(phrase.lower().rstrip(".!") in text for phrase in question.mentions):
        return False
    before = text[: len(text) - len(answer)] if answer else ""
    return not before or not (before[-1].isalnum() or before[-1] in "-.")
