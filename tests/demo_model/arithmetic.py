"""Numbers: addition, subtraction, multiplication, comparing and sorting, each with its working shown."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from random import Random
from typing import Any

from demo_model.example import Example, is_held_out
from demo_model.lexicon import NAMES
from demo_model.wording import casual, fill

from redshard.cluster.commands.demo_questions import DemoQuestion

_COLUMNS = ("Ones", "Tens", "Hundreds", "Thousands")

_ADD = (
    "[What is|What's|Calculate|Compute|Work out|How much is] {a} [+|plus] {b}?",
    "[What is|What's] the sum of {a} and {b}?",
    "[Add|Sum] {a} and {b}.",
    "{a} + {b}[| = ?|?| =]",
    "{a}+{b}[|=?|=]",
    "[What do you get|What is the result] if you add {b} to {a}?",
    "{a} plus {b}[| is what|, what does that make]?",
    "Find the total of {a} and {b}.",
    "{name} has {a} [coins|stamps|marbles|stickers|apples] and gets {b} more. "
    "How many [are there now|is that]?",
    "A [farm|shop|school|library] had {a} [visitors|customers|guests] on Monday and {b} on Tuesday. "
    "How many in all?",
)
_SUBTRACT = (
    "[What is|What's|Calculate|Compute|Work out|How much is] {a} [-|minus] {b}?",
    "{a} - {b}[| = ?|?| =]",
    "{a}-{b}[|=?|=]",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "[What do you get|What is the result] if you subtract {b} from {a}?",
    "{a} minus {b}[| is what|, what does that make]?",
    "[What is|Find] {a} less {b}.",
)
_SUBTRACT_THINGS = (
    "{name} has {a} [coins|stamps|marbles|stickers|apples] and gives away {b}. How many are left?",
    "[What is|Find] the difference between {a} and {b}.",
    "A [shop|library|bakery] had {a} [books|cakes|boxes] and sold {b}. How many remain?",
)
_MULTIPLY = (
    "[What is|What's|Calculate|Compute|Work out|How much is] {a} [x|*|times|multiplied by] {b}?",
    "{a} [x|*|times] {b}[| = ?|?| =]",
    "{a}*{b}[|=?|=]",
    "Multiply {a} [by|and|with] {b}.",
    "[What is|Find] the product of {a} and {b}.",
    "There are {a} boxes with {b} {thing} each. How many {thing} are there?",
    "{name} buys {a} tickets at {b} coins each. How many coins is that?",
)

_THINGS = ("pens", "eggs", "toys", "books", "apples")


def _number(rng: Random, weights: tuple[int, ...]) -> int:
    """A whole number whose count of digits is drawn by `weights` (first: one digit)."""
    digits = rng.choices(range(1, len(weights) + 1), weights)[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _digit(number: int, column: int) -> int | None:
    """The digit in `column` counted from the ones, None beyond the first digit."""
    return int(str(number)[-1 - column]) if column < len(str(number)) else None


def add_by_columns(a: int, b: int) -> str:
    """The working of a + b, right to left with carries, ending with the result."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for column in range(width):
        digits = [d for d in (_digit(a, column), _digit(b, column)) if d is not None]
        terms = [*digits, 1] if carry else digits
        total = sum(terms)
        carry = total // 10
        working = " + ".join(map(str, terms)) + (f" = {total}" if len(terms) > 1 else "")
        steps.append(
            f"{_COLUMNS[column]}: {working}" + (", carry 1." if carry and column < width - 1 else ".")
        )
    return f"{' '.join(steps)} So {a} + {b} = {a + b}."


def _subtract_columns(a: int, b: int) -> str:
    steps, borrow = [], 0
    for column in range(len(str(a))):
        top, bottom = _digit(a, column), _digit(b, column)
        assert top is not None
        needs_borrow = top < (bottom or 0) + borrow
        terms = [top + 10 if needs_borrow else top] + [d for d in (bottom,) if d is not None] + [1] * borrow
        working = " - ".join(map(str, terms))
        if len(terms) > 1:
            working += f" = {terms[0] - sum(terms[1:])}"
        steps.append(f"{_COLUMNS[column]}: {working}" + (", borrow 1." if needs_borrow else "."))
        borrow = int(needs_borrow)
    return " ".join(steps)


def subtract_by_columns(a: int, b: int) -> str:
    """The working of a - b, right to left with borrows, ending with the result; negative if a < b."""
    if a < b:
        return f"{a} is less than {b}, so take {b} - {a}. {_subtract_columns(b, a)} So {a} - {b} = {a - b}."
    if a < 10:
        return f"{a} - {b} = {a - b}."
    return f"{_subtract_columns(a, b)} So {a} - {b} = {a - b}."


def multiply_by_parts(a: int, b: int) -> str:
    """The working of a x b by partial products, ending with the result."""

    def parts(number: int) -> list[int]:
        tens, ones = number // 10 * 10, number % 10
        return [part for part in (tens, ones) if part] or [0]

    products = [(p, q, p * q) for p in parts(a) for q in parts(b)]
    if len(products) == 1:
        return f"{a} x {b} = {a * b}."
    steps = [f"{p} x {q} = {product}" for p, q, product in products]
    total, sums = products[0][2], []
    for _, _, product in products[1:]:
        sums.append(f"{total} + {product} = {total + product}.")
        total += product
    return f"{', '.join(steps)}. {' '.join(sums)} So {a} x {b} = {a * b}."


def addition(rng: Random) -> Example:
    """A + b, each of 1 to 4 digits."""
    a, b = _number(rng, (2, 3, 5, 6)), _number(rng, (2, 3, 5, 6))
    prompt = casual(rng, fill(rng, rng.choice(_ADD), a=a, b=b, name=rng.choice(NAMES)))
    question = DemoQuestion("addition", prompt, answer=str(a + b))
    return Example(question, add_by_columns(a, b), is_held_out("add", *sorted((a, b))))


def subtraction(rng: Random) -> Example:
    """A - b, each of 1 to 4 digits; a quarter of the results are negative."""
    a, b = _number(rng, (2, 3, 5, 6)), _number(rng, (2, 3, 5, 6))
    if (a < b) != (rng.random() < 0.25):
        a, b = b, a
    wordings = _SUBTRACT + _SUBTRACT_THINGS if a >= b else _SUBTRACT
    prompt = casual(rng, fill(rng, rng.choice(wordings), a=a, b=b, name=rng.choice(NAMES)))
    question = DemoQuestion("subtraction", prompt, answer=str(a - b))
    return Example(question, subtract_by_columns(a, b), is_held_out("subtract", *sorted((a, b))))


def multiplication(rng: Random) -> Example:
    """A x b, each of 1 or 2 digits."""
    a, b = _number(rng, (1, 3)), _number(rng, (1, 3))
    prompt = casual(
        rng, fill(rng, rng.choice(_MULTIPLY), a=a, b=b, name=rng.choice(NAMES), thing=rng.choice(_THINGS))
    )
    question = DemoQuestion("multiplication", prompt, answer=str(a * b))
    return Example(question, multiply_by_parts(a, b), is_held_out("multiply", *sorted((a, b))))


def _two_unlike(rng: Random) -> tuple[int, int]:
    """Two different numbers of up to 4 digits, often alike in their first digits."""
    a = _number(rng, (1, 3, 4, 5))
    kind = rng.random()
    if kind < 0.25:
        place = 10 ** rng.randrange(len(str(a)))
        b = a + place * rng.choice((-1, 1)) * rng.randint(1, 9)
    elif kind < 0.5:
        digits = list(str(a))
        rng.shuffle(digits)
        b = int("".join(digits))
    else:
        b = _number(rng, (1, 3, 4, 5))
    return (a, b) if a != b and 0 <= b <= 9999 else _two_unlike(rng)


def _why(a: int, b: int) -> str:
    """What decides between a and b: the number of digits, or the first digit that differs."""
    x, y = str(a), str(b)
    if len(x) != len(y):
        digits = [f"{n} has {len(n)} digit{'s' if len(n) > 1 else ''}" for n in (x, y)]
        return " and ".join(digits)
    first = next(i for i in range(len(x)) if x[i] != y[i])
    same = [f"{d} = {d}" for d in x[:first]]
    decides = f"{x[first]} {'>' if x[first] > y[first] else '<'} {y[first]}"
    plural = "s" if len(x) > 1 else ""
    return f"Both have {len(x)} digit{plural}. From the left: {', '.join([*same, decides])}"


_WHICH = (
    "[Which|Which number|Which one] is {word}[, |: ]{a} or {b}?",
    "[What|Which] is the {word} [number|one] of {a} and {b}?",
    "{a} or {b}: which is {word}?",
    "[Compare {a} and {b}.|Compare {a} with {b}.] Which is {word}?",
)
_IS_IT = (
    "Is {a} {word} than {b}?",
    "[True or false|Yes or no]: {a} is {word} than {b}[?|.]",
    "{a} {sign} {b}, [right|true|correct]?",
)


def comparing(rng: Random) -> Example:
    """The larger or smaller of two numbers, or whether one is larger than the other."""
    a, b = _two_unlike(rng)
    up = rng.random() < 0.5
    word = rng.choice(("larger", "bigger", "greater") if up else ("smaller", "less", "lower"))
    held_out = is_held_out("compare", *sorted((a, b)))
    if rng.random() < 0.65:
        answer = str(max(a, b) if up else min(a, b))
        prompt = fill(rng, rng.choice(_WHICH), a=a, b=b, word="smaller" if word == "less" else word)
        reply = f"{_why(a, b)}, so the {'larger' if up else 'smaller'} number is {answer}."
    else:
        answer = "yes" if (a > b) == up else "no"
        prompt = fill(rng, rng.choice(_IS_IT), a=a, b=b, word=word, sign=">" if up else "<")
        reply = (
            f"{_why(a, b)}, so {a} is {'larger' if a > b else 'smaller'} than {b}. The answer is {answer}."
        )
    return Example(DemoQuestion("comparing", casual(rng, prompt), answer=answer), reply, held_out)


def insertion_steps(items: list[str], key: Callable[[str], Any]) -> str:
    """The working of an insertion sort of `items` by `key`, ending with all of them in order."""
    done = [items[0]]
    steps = [f"Start with {items[0]}."]
    for i, item in enumerate(items[1:], start=1):
        insort(done, item, key=key)
        finished = ", and all are in order" if i == len(items) - 1 else ""
        steps.append(f"Insert {item}{finished}: {', '.join(done)}.")
    return " ".join(steps)


_SORT_UP = (
    "[Sort|Order|Arrange] [these numbers|the numbers|] "
    "[from smallest to largest|in ascending order]: {items}[|.]",
    "[Sort|Order|Arrange] {items} [from smallest to largest|in ascending order|from low to high][|.]",
    "[Sort|Order] these numbers: {items}[|.]",
    "Put {items} in [ascending|increasing] order[|.]",
)
_SORT_DOWN = (
    "[Sort|Order|Arrange] [these numbers|the numbers|] "
    "[from largest to smallest|in descending order]: {items}[|.]",
    "[Sort|Order|Arrange] {items} [from largest to smallest|in descending order|from high to low][|.]",
    "Put {items} in [descending|decreasing] order[|.]",
)


def sorting_numbers(rng: Random) -> Example:
    """Three to five different numbers of up to 4 digits, put in order."""
    numbers = list({_number(rng, (2, 4, 4, 3)) for _ in range(rng.randint(3, 5))})
    if len(numbers) < 3:
        return sorting_numbers(rng)
    rng.shuffle(numbers)
    down = rng.random() < 0.35
    ordered = sorted(numbers, reverse=down)
    items = ", ".join(map(str, numbers))
    if rng.random() < 0.15:
        items = " ".join(map(str, numbers))
    prompt = fill(rng, rng.choice(_SORT_DOWN if down else _SORT_UP), items=items).replace("  ", " ")
    reply = insertion_steps([str(n) for n in numbers], key=lambda n: -int(n) if down else int(n))
    question = DemoQuestion("sorting numbers", casual(rng, prompt), answer=", ".join(map(str, ordered)))
    return Example(question, reply, is_held_out("sort", *sorted(numbers)))
