"""The corpus: its answers are true by an independent check, and nothing held out is trained on."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from demo_model.arithmetic import addition, comparing, multiplication, sorting_numbers, subtraction
from demo_model.calendar_days import date_offset, weekday_of_date, weekday_offset
from demo_model.capitals import capitals
from demo_model.corpus import TASKS, draw, held_out_examples, training_chat
from demo_model.example import Example
from demo_model.facts import CAPITALS, MONTHS, WEEKDAYS
from demo_model.letters import counting_letters, reversing, sorting_words
from demo_model.lexicon import WORDS
from demo_model.measures import length, temperature
from demo_model.questions import choose_questions
from demo_model.tokens import TURN_END, encode_chat, load_tokenizer, pack, prompt_ids, reply_ids

from redshard.cluster.commands.demo_questions import QUESTIONS, DemoQuestion, is_right

_EACH = 400


def _examples(task: Callable[[Random], Example]) -> list[Example]:
    rng = Random(task.__name__)
    return [task(rng) for _ in range(_EACH)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _date(text: str) -> datetime.date:
    """The first date in `text`, as `March 5, 2024` or `5 March 2024`, in any case."""
    for match in re.finditer(r"(\w+) (\d+), (\d{4})|(\d+) (\w+) (\d{4})", text):
        month, day, year = match[1] or match[5], match[2] or match[4], match[3] or match[6]
        if month.capitalize() in MONTHS:
            return datetime.date(int(year), MONTHS.index(month.capitalize()) + 1, int(day))
    raise AssertionError(f"no date in {text!r}")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_every_reply_is_right(task: Callable[[Random], Example]) -> None:
    for example in _examples(task):
        assert is_right(example.question, example.plain_reply), example


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_replies_are_short(task: Callable[[Random], Example]) -> None:
    assert max(len(reply_ids(example.reply)) for example in _examples(task)) < 150


def test_steps_of_working_are_true() -> None:
    """Every `a + b = c`, with any signs and number of terms, in any reply, holds."""
    number = r"-?\d+(?:\.\d+)?"
    equation = re.compile(rf"(?<![+x/-] )(?<![\w.-])({number}(?: [+x-] {number})+) = ({number})")
    seen = 0
    for task in TASKS:
        for example in _examples(task):
            for left, right in equation.findall(example.plain_reply):
                seen += 1
                assert eval(left.replace("x", "*")) == pytest.approx(float(right)), example.plain_reply
    assert seen > 3 * _EACH


@pytest.mark.parametrize(
    ("task", "expected"),
    [(addition, lambda a, b: a + b), (multiplication, lambda a, b: a * b)],
)
def test_sums_and_products(task: Callable[[Random], Example], expected: Callable[[int, int], int]) -> None:
    for example in _examples(task):
        a, b = _numbers(example.question.prompt)
        assert int(example.question.answer) == expected(a, b)
        assert max(a, b) <= (9999 if task is addition else 99)


def test_differences() -> None:
    negative = 0
    for example in _examples(subtraction):
        a, b = _numbers(example.question.prompt)
        assert int(example.question.answer) in (a - b, b - a)
        assert example.plain_reply.split("So ")[-1].rstrip(".") in (
            f"{a} - {b} = {a - b}",
            f"{b} - {a} = {b - a}",
        ) or (max(a, b) < 10)
        negative += int(example.question.answer) < 0
    assert negative > _EACH / 10


def test_comparisons() -> None:
    for example in _examples(comparing):
        prompt, answer = example.question.prompt.lower(), example.question.answer
        a, b = _numbers(prompt)
        up = any(word in prompt for word in ("larger", "bigger", "greater", ">"))
        if answer in ("yes", "no"):
            assert answer == ("yes" if (a > b) == up else "no")
        else:
            assert int(answer) == (max(a, b) if up else min(a, b))


def test_sorted_numbers() -> None:
    for example in _examples(sorting_numbers):
        answer = _numbers(example.question.answer)
        down = any(
            word in example.question.prompt.lower()
            for word in ("descending", "decreasing", "to smallest", "to low")
        )
        assert answer == sorted(_numbers(example.question.prompt), reverse=down)


def test_sorted_words() -> None:
    for example in _examples(sorting_words):
        words = example.question.answer.split(", ")
        assert all(a < b for a, b in pairwise(words))
        assert all(re.search(rf"\b{word}\b", example.question.prompt, re.IGNORECASE) for word in words)


def test_reversed_words() -> None:
    for example in _examples(reversing):
        answer = example.question.answer
        back = ", ".join(reversed(answer.split(", "))) if "," in answer else answer[::-1]
        assert back in example.question.prompt.lower()


def test_counted_letters() -> None:
    for example in _examples(counting_letters):
        spelled, _, last = example.plain_reply.partition(". So ")
        word = re.sub(r"[^a-z]", "", spelled.removeprefix("Spelled out: "))
        assert word in example.question.prompt.lower()
        count, noun = example.question.answer.split()
        if noun.startswith("time"):
            letter = last.removeprefix("the letter ")[0]
            assert int(count) == word.count(letter)
        else:
            letters = word if noun.startswith("letter") else re.sub("[^aeiou]", "", word)
            assert int(count) == len(letters)


def test_temperatures() -> None:
    for example in _examples(temperature):
        value, unit = re.match(r"(-?[\d.]+) (\S+)", example.question.answer).groups()
        start = float(re.search(r"-?\d+(\.\d+)?", example.question.prompt)[0])
        source = re.search(r"So \S+ (\S+) is", example.plain_reply)[1]
        celsius = {"°C": start, "°F": (start - 32) / 1.8, "K": start - 273.15}[source]
        expected = {"°C": celsius, "°F": celsius * 1.8 + 32, "K": celsius + 273.15}[unit]
        assert float(value) == pytest.approx(expected, abs=0.051 if source == "°F" else 1e-6)


def test_lengths() -> None:
    meters = {"km": 1000, "m": 1, "cm": 0.01, "mm": 0.001}
    meters |= {"inches": 0.0254, "feet": 0.3048, "yards": 0.9144, "miles": 1609.344}
    for example in _examples(length):
        amount, source = re.search(r"So ([\d.]+) (\w+) is", example.plain_reply).groups()
        assert amount in example.question.prompt
        parts = re.findall(r"([\d.]+) (\w+)", example.question.answer)
        total = sum(float(value) * meters[unit] for value, unit in parts)
        assert total == pytest.approx(float(amount) * meters[source], rel=1e-3)


def test_weekdays_and_dates() -> None:
    for example in _examples(weekday_of_date):
        assert WEEKDAYS[_date(example.question.prompt).weekday()] == example.question.answer
    for example in _examples(date_offset):
        prompt = example.question.prompt.lower()
        days = int(re.search(r"(\d+) day", prompt)[1]) * (-1 if "before" in prompt else 1)
        assert _date(prompt) + datetime.timedelta(days) == _date(example.question.answer)
    for example in _examples(weekday_offset):
        prompt = example.question.prompt.lower()
        start = next(i for i, day in enumerate(WEEKDAYS) if day.lower() in prompt)
        days = int(re.search(r"(\d+) day", prompt)[1]) * (-1 if "before" in prompt or "ago" in prompt else 1)
        assert WEEKDAYS[(start + days) % 7] == example.question.answer


def test_capitals() -> None:
    assert len(CAPITALS) >= 120
    known = {
        "France": "Paris",
        "Japan": "Tokyo",
        "Kenya": "Nairobi",
        "Brazil": "Brasilia",
        "Canada": "Ottawa",
    }
    assert known.items() <= CAPITALS.items()
    for example in _examples(capitals):
        capital, _, country = example.plain_reply.rstrip(".").partition(" is the capital of ")
        if not country:
            country, _, capital = capital.removeprefix("The capital of ").partition(" is ")
        assert CAPITALS[country] == capital


def _contents(example: Example) -> list[str]:
    """What a question is about, however it is worded: its numbers, or its words of the list."""
    prompt = example.question.prompt.lower()
    return sorted(re.findall(r"-?\d+(?:\.\d+)?", prompt)) or sorted(
        set(re.findall("[a-z]+", prompt)) & set(WORDS)
    )


@pytest.mark.parametrize(
    "task", [addition, subtraction, multiplication, comparing, sorting_numbers, sorting_words]
)
def test_no_content_is_on_both_sides(task: Callable[[Random], Example]) -> None:
    rng = Random(1)
    common = {"word", "words", "order"}  # of the wording, but also in the list
    trained = {tuple(set(_contents(draw(task, rng, held_out=False))) - common) for _ in range(20 * _EACH)}
    held_out = {tuple(set(_contents(example)) - common) for example in held_out_examples(task, _EACH)}
    assert len(held_out) > _EACH / 4
    assert not trained & held_out


def test_no_held_out_word_is_spelled_in_training() -> None:
    rng = Random(2)
    kept = {example.question.answer for example in held_out_examples(reversing, _EACH)}
    trained = {draw(reversing, rng, held_out=False).question.answer for _ in range(20 * _EACH)}
    assert kept.isdisjoint(trained)


def test_no_held_out_wording_of_capitals_is_trained_on() -> None:
    def wording(example: Example) -> str:
        prompt = example.question.prompt.lower()
        country, capital = next(
            pair for pair in CAPITALS.items() if f"{pair[0]} is {pair[1]}" in example.plain_reply
            or f"{pair[1]} is the capital of {pair[0]}" in example.plain_reply
        )  # fmt: skip
        return prompt.replace(country.lower(), "_").replace(capital.lower(), "_").strip("?!. ")

    rng = Random(3)
    trained = {wording(draw(capitals, rng, held_out=False)) for _ in range(20 * _EACH)}
    held_out = {wording(example) for example in held_out_examples(capitals, _EACH)}
    assert len(held_out) >= 9
    assert not trained & held_out


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_a_question_settles_its_reply(task: Callable[[Random], Example]) -> None:
    """No reply is drawn at random: greedy decoding would then have to choose between equals."""
    rng = Random(4)
    replies: dict[str, str] = {}
    for _ in range(10 * _EACH):
        example = task(rng)
        prompt = example.question.prompt.lower().rstrip("?.")
        assert replies.setdefault(prompt, example.reply) == example.reply, prompt


def test_the_same_seed_gives_the_same_corpus() -> None:
    assert training_chat(Random(5)) == training_chat(Random(5))
    assert held_out_examples(addition, 20) == held_out_examples(addition, 20)


def test_demo_questions_are_the_chosen_held_out_ones() -> None:
    assert choose_questions() == QUESTIONS
    assert {question.task for question in QUESTIONS} == {task(Random(0)).question.task for task in TASKS}
    assert len(QUESTIONS) >= 32


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("So 5 + 7 = 12.", True),
        ("12", True),
        ("So 5 + 7 = 112.", False),
        ("So 5 + 7 = -12.", False),
        ("So 5 + 7 = 0.12.", False),
        ("12 is the answer, I think", False),
        ("", False),
    ],
)
def test_the_check_of_a_number(reply: str, right: bool) -> None:
    assert is_right(DemoQuestion("addition", "5 + 7", answer="12"), reply) == right


def test_the_check_of_mentions() -> None:
    question = DemoQuestion("stories", "A story about a fox", mentions=("fox", "lived"))
    assert is_right(question, "A Fox lived here.")
    assert not is_right(question, "A cat lived here.")


def test_a_chat_is_encoded_as_its_text_and_learned_in_its_replies() -> None:
    tokenizer = load_tokenizer()
    system, examples = (
        "Answer briefly.",
        [draw(reversing, Random(7), False), draw(addition, Random(7), False)],
    )
    ids, learned = encode_chat(system, examples)
    text = "<|im_start|>system\nAnswer briefly.<|im_end|>\n" + "".join(
        f"<|im_start|>user\n{e.question.prompt}<|im_end|>\n<|im_start|>assistant\n{e.plain_reply}<|im_end|>\n"
        for e in examples
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    replies = tokenizer.decode(
        [i for i, of_reply in zip(ids, learned, strict=True) if of_reply], skip_special_tokens=False
    )
    assert replies == "".join(e.plain_reply + TURN_END for e in examples)


def test_rows_hold_whole_chats_that_begin_at_the_start() -> None:
    ids, learned = pack(Random(8), rows=16, length=256)
    assert ids.shape == learned.shape == (16, 256)
    start = prompt_ids("x")[0]
    assert (ids[:, 0] == start).all()
    assert (ids != load_tokenizer().token_to_id("<|endoftext|>")).mean() > 0.85
    for row in range(16):
        text = load_tokenizer().decode(ids[row].tolist(), skip_special_tokens=False).split("<|endoftext|>")[0]
        assert text.count("<|im_start|>") == text.count("<|im_end|>")
