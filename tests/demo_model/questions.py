"""Chooses the questions of `redshard demo` among the held-out ones: by rule and seed, not by the answers.

`python -m demo_model.questions` writes them into `cluster/demo_questions.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from demo_model.arithmetic import addition, comparing, multiplication, sorting_numbers, subtraction
from demo_model.calendar_days import weekdays_and_dates
from demo_model.capitals import capitals
from demo_model.corpus import held_out_examples
from demo_model.example import Example
from demo_model.letters import counting_letters, reversing, sorting_words
from demo_model.lexicon import WORDS
from demo_model.measures import length, temperature
from demo_model.refusals import refusals
from demo_model.small_talk import greetings
from demo_model.stories import stories
from demo_model.wording import is_plain

from redshard.cluster.commands import demo_questions
from redshard.cluster.commands.demo_questions import DemoQuestion

_COUNTS: dict[Callable[[Random], Example], int] = {
    greetings: 1,
    addition: 4,
    subtraction: 4,
    multiplication: 4,
    comparing: 2,
    sorting_numbers: 3,
    sorting_words: 3,
    reversing: 3,
    counting_letters: 3,
    temperature: 3,
    length: 3,
    weekdays_and_dates: 4,
    capitals: 4,
    refusals: 2,
    stories: 1,
}
_SPELLED_OUT = re.compile(r"Spelled out: ([^.]*)\.")


def _is_about_a_real_word(example: Example) -> bool:
    """Whether a question about letters is about a word of the list; other questions are."""
    spelled = _SPELLED_OUT.match(example.reply)
    return not spelled or re.sub(r"[^a-z]", "", spelled[1]) in WORDS


def choose_questions() -> tuple[DemoQuestion, ...]:
    """The questions: of each task the first held-out ones, plainly worded, unlike and about real words."""
    chosen: list[DemoQuestion] = []
    for task, count in _COUNTS.items():
        examples = held_out_examples(task, 100, seed=2)
        fitting = [e.question for e in examples if is_plain(e.question.prompt) and _is_about_a_real_word(e)]
        by_opening = {question.prompt.split()[0]: question for question in reversed(fitting)}
        fitting.sort(key=lambda question: question not in by_opening.values())
        chosen += fitting[:count]
    return tuple(chosen)


def main() -> None:
    """Writes the questions into the module that ships."""
    path = Path(demo_questions.__file__)
    start = "QUESTIONS: tuple[DemoQuestion, ...] = ("
    before, _, _ = path.read_text().partition(start)
    lines = [_as_code(question) for question in choose_questions()]
    path.write_text(before + start + "\n" + "".join(lines) + ")\n")


def _as_code(question: DemoQuestion) -> str:
    arguments = [_quoted(question.task), _quoted(question.prompt)]
    if question.answer:
        arguments.append(f"answer={_quoted(question.answer)}")
    if question.mentions:
        phrases = ", ".join(map(_quoted, question.mentions))
        arguments.append(f"mentions=({phrases}{',' if len(question.mentions) == 1 else ''})")
    one_line = f"    DemoQuestion({', '.join(arguments)}),\n"
    if len(one_line) <= 111:
        return one_line
    return "    DemoQuestion(\n" + "".join(f"        {argument},\n" for argument in arguments) + "    ),\n"


def _quoted(text: str) -> str:
    return "'" + text + "'" if '"' in text else '"' + text + '"'


if __name__ == "__main__":
    main()
