"""Conversions of temperature and length, with exact decimal arithmetic."""

from __future__ import annotations

from decimal import Decimal
from random import Random

from demo_model.example import Example, is_held_out
from demo_model.wording import casual, fill

from redshard.cluster.commands.demo_questions import DemoQuestion

_CONVERT = (
    "[What is|What's|Convert|Express] {n} {from_} in {to}[|.]",
    "Convert {n} {from_} [to|into] {to}[|.]",
    "How [many|much] {to} [is|are] {n} {from_}?",
    "{n} {from_} [in|to] {to}[|?| =| = ?]",
    "[Change|Turn] {n} {from_} into {to}[|.]",
    "What is {n} {from_} in {to}?",
)


def _text(value: Decimal) -> str:
    """The shortest decimal notation: 3.50 becomes 3.5, 100.0 becomes 100."""
    return f"{value:f}".rstrip("0").rstrip(".") if "." in f"{value:f}" else f"{value:f}"


def celsius_to_fahrenheit(c: Decimal) -> tuple[str, str]:
    """Working and answer: double, take a tenth of that away, add 32."""
    double = 2 * c
    scaled = double - double / 10
    answer = f"{_text(scaled + 32)} °F"
    working = (
        f"Double {_text(c)} is {_text(double)}, minus a tenth ({_text(double / 10)}) is {_text(scaled)}, "
        f"plus 32 is {_text(scaled + 32)}. So {_text(c)} °C is {answer}."
    )
    return working, answer


def fahrenheit_to_celsius(f: int) -> tuple[str, str]:
    """Working and answer: take 32 away, times 5, long division by 9; one decimal, rounded."""
    less = f - 32
    if less == 0:
        return f"{f} - 32 = 0. So {f} °F is 0 °C.", "0 °C"
    times = 5 * abs(less)
    steps, rest = [], 0
    for digit in str(times):
        rest = 10 * rest + int(digit)
        if rest >= 9 or steps:
            steps.append(f"{rest} / 9 = {rest // 9} remainder {rest % 9}")
            rest %= 9
    sign = "-" if less < 0 else ""
    tenths = (0, 1, 2, 3, 4, 6, 7, 8, 9)[rest]
    answer = f"{sign}{times // 9}{f'.{tenths}' if tenths else ''} °C"
    if not steps:
        steps = [f"{times} / 9 = 0 remainder {rest}"]
    about = "about " if tenths else ""
    working = (
        f"{f} - 32 = {less}, and {less} x 5 = {sign}{times}. Divide by 9: {', '.join(steps)}. "
        f"So {f} °F is {about}{answer}."
    )
    return working, answer


def _kelvin(value: Decimal, to_kelvin: bool) -> tuple[str, str]:
    sign = "+" if to_kelvin else "-"
    result = value + Decimal("273.15") if to_kelvin else value - Decimal("273.15")
    units = ("°C", "K") if to_kelvin else ("K", "°C")
    answer = f"{_text(result)} {units[1]}"
    return (
        f"{_text(value)} {sign} 273.15 = {_text(result)}. So {_text(value)} {units[0]} is {answer}.",
        answer,
    )


_CELSIUS = ("°C", "°C", "C", "degrees Celsius", "Celsius", "degrees C")
_FAHRENHEIT = ("°F", "°F", "F", "degrees Fahrenheit", "Fahrenheit", "degrees F")
_KELVIN = ("K", "kelvin")


def temperature(rng: Random) -> Example:
    """Between Celsius and Fahrenheit, and between Celsius and kelvin."""
    kind = rng.random()
    if kind < 0.45:
        c = Decimal(rng.randint(-100, 500) if rng.random() < 0.8 else rng.randint(-60, 900))
        if rng.random() < 0.25:
            c = Decimal(rng.randint(-500, 1200)) / 10
        units, content = (_CELSIUS, _FAHRENHEIT), ("c to f", str(c))
        shown, (reply, answer) = _text(c), celsius_to_fahrenheit(c)
    elif kind < 0.85:
        f = rng.randint(-100, 500)
        units, content = (_FAHRENHEIT, _CELSIUS), ("f to c", str(f))
        shown, (reply, answer) = str(f), fahrenheit_to_celsius(f)
    else:
        up = rng.random() < 0.5
        value = Decimal(rng.randint(-200, 700) if up else rng.randint(0, 900))
        units, content = ((_CELSIUS, _KELVIN) if up else (_KELVIN, _CELSIUS)), ("kelvin", up, str(value))
        shown, (reply, answer) = _text(value), _kelvin(value, up)
    from_, to = rng.choice(units[0]), rng.choice(units[1])
    prompt = fill(rng, rng.choice(_CONVERT), n=shown, from_=from_, to=to)
    if from_[0] == "°" and rng.random() < 0.3:
        prompt = prompt.replace(f" {from_}", from_)
    question = DemoQuestion("temperature", casual(rng, prompt), answer=answer)
    return Example(question, reply, is_held_out(*content))


#: Larger metric unit, smaller one, how many of the smaller make one of the larger.
_METRIC = (("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("m", "mm", 1000))
#: Unit, unit, the second in the first as parts to multiply by, and whether that factor is exact.
_OTHER = (
    ("feet", "inches", ("10", "2"), True),
    ("yards", "feet", ("3",), True),
    ("inches", "cm", ("2", "0.5", "0.04"), True),
    ("miles", "km", ("1", "0.6", "0.009"), False),
    ("km", "miles", ("0.6", "0.02", "0.001"), False),
)
_NAMES = {
    "km": ("km", "kilometers", "kilometres"),
    "m": ("m", "meters", "metres"),
    "cm": ("cm", "centimeters", "centimetres"),
    "mm": ("mm", "millimeters", "millimetres"),
}


def _times_parts(n: int, parts: tuple[str, ...], from_: str, to: str, exact: bool) -> tuple[str, str]:
    factor = sum(map(Decimal, parts))
    about = "" if exact else "about "
    answer = f"{_text(n * factor)} {to}"
    start = f"1 {_singular(from_)} is {about}{_text(factor)} {to}."
    if len(parts) == 1:
        return f"{start} {n} x {parts[0]} = {_text(n * factor)}. So {n} {from_} is {about}{answer}.", answer
    products = [n * Decimal(part) for part in parts]
    steps = [f"{n} x {part} = {_text(product)}" for part, product in zip(parts, products, strict=True)]
    total, sums = products[0], []
    for product in products[1:]:
        sums.append(f"{_text(total)} + {_text(product)} = {_text(total + product)}.")
        total += product
    return f"{start} {', '.join(steps)}. {' '.join(sums)} So {n} {from_} is {about}{answer}.", answer


def _singular(unit: str) -> str:
    return {"feet": "foot", "inches": "inch", "yards": "yard", "miles": "mile"}.get(unit, unit)


def _metric(rng: Random) -> tuple[str, str, str, str, str]:
    """Amount, unit, unit, working and answer of a metric conversion."""
    large, small, factor = rng.choice(_METRIC)
    if rng.random() < 0.5:
        n = Decimal(rng.randint(1, 999) if rng.random() < 0.6 else rng.randint(1, 9999)) / rng.choice(
            (1, 1, 10)
        )
        answer = f"{_text(n * factor)} {small}"
        working = f"1 {large} is {factor} {small}. {_text(n)} x {factor} = {_text(n * factor)}."
        return _text(n), large, small, f"{working} So {_text(n)} {large} is {answer}.", answer
    n = Decimal(rng.randint(1, 9999)) * rng.choice((1, 1, 10))
    answer = f"{_text(n / factor)} {large}"
    working = f"{factor} {small} is 1 {large}. {_text(n)} / {factor} = {_text(n / factor)}."
    return _text(n), small, large, f"{working} So {_text(n)} {small} is {answer}.", answer


def length(rng: Random) -> Example:
    """Between metric units, and to or from feet, inches, yards and miles."""
    if rng.random() < 0.5:
        shown, from_, to, reply, answer = _metric(rng)
    elif rng.random() < 0.15:
        n = rng.randint(13, 240)
        shown, from_, to = str(n), "inches", "feet and inches"
        answer = f"{n // 12} feet {n % 12} inches"
        reply = f"12 inches is 1 foot. {n // 12} x 12 = {n // 12 * 12} and {n} - {n // 12 * 12} = {n % 12}. "
        reply += f"So {n} inches is {answer}."
    else:
        from_, to, parts, exact = rng.choice(_OTHER)
        n = rng.randint(2, 300)
        shown = str(n)
        reply, answer = _times_parts(n, parts, from_, to, exact)
    held_out = is_held_out("length", from_, to, shown)
    names = (rng.choice(_NAMES.get(unit, (unit,))) for unit in (from_, to))
    prompt = fill(rng, rng.choice(_CONVERT), n=shown, from_=next(names), to=next(names))
    return Example(DemoQuestion("length", casual(rng, prompt), answer=answer), reply, held_out)
