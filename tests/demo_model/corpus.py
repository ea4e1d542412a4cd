"""The corpus: every task with its share, and chats made of them.

`python -m demo_model.corpus` prints a few chats.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo_model.arithmetic import addition, comparing, multiplication, sorting_numbers, subtraction
from demo_model.calendar_days import weekdays_and_dates
from demo_model.capitals import capitals
from demo_model.example import Example
from demo_model.letters import counting_letters, reversing, sorting_words
from demo_model.measures import length, temperature
from demo_model.refusals import refusals
from demo_model.small_talk import greetings
from demo_model.stories import stories

#: Each task with its share of the training examples.
TASKS: dict[Callable[[Random], Example], int] = {
    addition: 12,
    subtraction: 12,
    multiplication: 9,
    comparing: 6,
    sorting_numbers: 9,
    sorting_words: 8,
    reversing: 9,
    counting_letters: 8,
    temperature: 8,
    length: 8,
    weekdays_and_dates: 10,
    capitals: 6,
    greetings: 3,
    refusals: 5,
    stories: 4,
}

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "You are a small demo model.",
    "Answer briefly.",
    "You are Redshard's demo model. Be polite.",
)


def draw(task: Callable[[Random], Example], rng: Random, held_out: bool) -> Example:
    """An example of `task` from the wanted side of the split."""
    while True:
        example = task(rng)
        if example.held_out == held_out:
            return example


def training_chat(rng: Random) -> tuple[str | None, list[Example]]:
    """A chat to train on: perhaps a system prompt, and one to three questions with their replies."""
    system = rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.1 else None
    turns = rng.choices((1, 2, 3), (85, 10, 5))[0]
    tasks = rng.choices(tuple(TASKS), tuple(TASKS.values()), k=turns)
    return system, [draw(task, rng, held_out=False) for task in tasks]


def held_out_examples(task: Callable[[Random], Example], count: int, seed: int = 0) -> list[Example]:
    """`count` different held-out questions of `task`; the same ones for the same seed."""
    rng = Random(f"{task.__name__} {seed}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = draw(task, rng, held_out=True)
        found.setdefault(example.question.prompt, example)
    return list(found.values())


if __name__ == "__main__":
    rng = Random(0)
    for task in TASKS:
        for held_out in (False, False, True):
            example = draw(task, rng, held_out)
            print(f"[{example.question.task}] {example.question.prompt}\n    {example.plain_reply}")
