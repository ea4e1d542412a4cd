"""Weekdays, months and dates."""

from __future__ import annotations

import datetime
from random import Random

from demo_model.example import Example, is_held_out
from demo_model.facts import MONTH_DAYS, MONTHS, WEEKDAYS, is_leap_year
from demo_model.wording import casual, fill

from redshard.cluster.commands.demo_questions import DemoQuestion

#: Added to day, year and leap years, these give the weekday, counted from Saturday = 0.
_MONTH_KEYS = (1, 4, 4, 0, 2, 5, 0, 3, 6, 1, 4, 6)
_FROM_SATURDAY = WEEKDAYS[5:] + WEEKDAYS[:5]


def _days(n: int) -> str:
    return f"{n} day{'' if n == 1 else 's'}"


def _count_off(start: int, n: int, forward: bool) -> str:
    """The working of counting n days on or back from weekday `start`, ending with the weekday reached."""
    step = 1 if forward else -1
    rest = n % 7
    passed = [WEEKDAYS[(start + step * i) % 7] for i in range(1, rest + 1)]
    reached = WEEKDAYS[(start + step * n) % 7]
    weeks = f"{n} = {n // 7} x 7 + {rest}. " if n >= 7 else ""
    if not passed:
        return f"{weeks}Whole weeks lead to the same weekday. So the answer is {reached}."
    order = "on" if forward else "back"
    counted = f"Count {_days(rest)} {order} from {WEEKDAYS[start]}: {', '.join(passed)}."
    return f"{weeks}{counted} So the answer is {reached}."


def weekday_offset(rng: Random) -> Example:
    """N days after or before a weekday."""
    start, n, forward = rng.randrange(7), rng.randint(1, 60), rng.random() < 0.6
    day = WEEKDAYS[start]
    templates = (
        (
            "[What day|Which weekday|What weekday] [comes|is] {n} after {day}?",
            "[Today is|It is] {day}. [What day|Which weekday] [will it be|is it] in {n}?",
            "If today is {day}, what day [is it|will it be] in {n}?",
        )
        if forward
        else (
            "[What day|Which weekday|What weekday] [comes|is] {n} before {day}?",
            "[Today is|It is] {day}. [What day|Which weekday] was it {n} ago?",
        )
    )
    prompt = fill(rng, rng.choice(templates), n=_days(n), day=day)
    answer = WEEKDAYS[(start + (n if forward else -n)) % 7]
    question = DemoQuestion("weekdays and dates", casual(rng, prompt), answer=answer)
    return Example(question, _count_off(start, n, forward), is_held_out("weekday", start, n, forward))


def _cross_months(day: int, month: int, year: int) -> tuple[list[str], str]:
    """The working that brings a day beyond `month` (0 to 11) into a month, and the date it then is."""

    def length() -> int:
        return MONTH_DAYS[month] + (month == 1 and is_leap_year(year))

    steps = []
    while day > length():
        steps.append(f"{MONTHS[month]} has {length()} days: {day} - {length()} = {day - length()}.")
        day -= length()
        year, month = year + (month == 11), (month + 1) % 12
    while day < 1:
        year, month = year - (month == 0), (month - 1) % 12
        minus = f"- {-day}" if day else "+ 0"
        steps.append(f"{MONTHS[month]} has {length()} days: {length()} {minus} = {length() + day}.")
        day += length()
    return steps, f"{MONTHS[month]} {day}, {year}"


def date_offset(rng: Random) -> Example:
    """N days after or before a date of a given year."""
    forward = rng.random() < 0.6
    start = datetime.date(rng.randint(1990, 2060), 1, 1) + datetime.timedelta(rng.randrange(365))
    n = rng.randint(1, 30)
    templates = (
        (
            "What [date is|is the date] {n} after {date}?",
            "[Which|What] date comes {n} after {date}?",
            "{date} plus {n}?",
        )
        if forward
        else ("What [date is|is the date] {n} before {date}?", "[Which|What] date comes {n} before {date}?")
    )
    date = f"{MONTHS[start.month - 1]} {start.day}, {start.year}"
    if rng.random() < 0.4:
        date = f"{start.day} {MONTHS[start.month - 1]} {start.year}"
    total = start.day + (n if forward else -n)
    crossing, answer = _cross_months(total, start.month - 1, start.year)
    reply = " ".join(
        [f"{start.day} {'+' if forward else '-'} {n} = {total}.", *crossing, f"So it is {answer}."]
    )
    prompt = fill(rng, rng.choice(templates), n=_days(n), date=date)
    question = DemoQuestion("weekdays and dates", casual(rng, prompt), answer=answer)
    return Example(question, reply, is_held_out("date", str(start), n, forward))


def leap_year(rng: Random) -> Example:
    """Whether a year is a leap year."""
    year = rng.randint(1500, 2400) if rng.random() < 0.85 else 100 * rng.randint(10, 30)
    wording = "[Is|Was] {year} a leap year?" if rng.random() < 0.8 else "Leap year or not: {year}?"
    prompt = fill(rng, wording, year=year)
    answer = "yes" if is_leap_year(year) else "no"
    century, rest = divmod(year, 100)
    divided = rest or century
    reply = (
        f"{year} ends in {rest:02d}, and {divided} is {'' if divided % 4 == 0 else 'not '}divisible by 4. "
        f"The answer is {answer}."
    )
    question = DemoQuestion("weekdays and dates", casual(rng, prompt), answer=answer)
    return Example(question, reply, is_held_out("leap", year))


def month_length(rng: Random) -> Example:
    """How many days a month of a given year has."""
    year, month = rng.randint(1900, 2100), rng.choice((1, *range(12)))
    prompt = fill(
        rng,
        "How many days [are in|are there in|has] {month} {year}?",
        month=MONTHS[month],
        year=year,
    )
    days = MONTH_DAYS[month] + (month == 1 and is_leap_year(year))
    leap = f"{year} is {'' if is_leap_year(year) else 'not '}a leap year. " if month == 1 else ""
    answer = f"{days} days"
    question = DemoQuestion("weekdays and dates", casual(rng, prompt), answer=answer)
    return Example(question, f"{leap}{MONTHS[month]} {year} has {answer}.", is_held_out("month", month, year))


def weekday_of_date(rng: Random) -> Example:
    """The weekday of a date from 2000 to 2099, by month keys."""
    date = datetime.date(2000, 1, 1) + datetime.timedelta(rng.randrange(36525))
    month, short = date.month - 1, date.year - 2000
    key = _MONTH_KEYS[month] - (month < 2 and is_leap_year(date.year))
    total = date.day + key + short + short // 4 + 6
    answer = _FROM_SATURDAY[total % 7]
    assert answer == WEEKDAYS[date.weekday()]
    text = f"{MONTHS[month]} {date.day}, {date.year}"
    if rng.random() < 0.4:
        text = f"{date.day} {MONTHS[month]} {date.year}"
    template = rng.choice(
        (
            "[What|Which] [day of the week|weekday|day] [is|was] {date}?",
            "On [what|which] [day|weekday] [does|did] {date} fall?",
            "What day of the week [will be|is] {date}?",
        )
    )
    reply = (
        f"{date.day} (day) + {key} ({MONTHS[month]}) + {short} (year) + {short // 4} (leap years) "
        f"+ 6 (century): "
        f"{date.day} + {key} = {date.day + key}, + {short} = {date.day + key + short}, "
        f"+ {short // 4} = {total - 6}, + 6 = {total}. {total} = {total // 7} x 7 + {total % 7}, "
        f"and {total % 7} stands for {answer}."
    )
    question = DemoQuestion("weekdays and dates", casual(rng, fill(rng, template, date=text)), answer=answer)
    return Example(question, reply, is_held_out("weekday of", str(date)))


def month_offset(rng: Random) -> Example:
    """The month n months after or before another."""
    month, n, forward = rng.randrange(12), rng.randint(1, 24), rng.random() < 0.6
    word = "after" if forward else "before"
    prompt = fill(
        rng,
        "[What|Which] month [is|comes] {n} {word} {month}?",
        n=f"{n} month{'' if n == 1 else 's'}",
        word=word,
        month=MONTHS[month],
    )
    number, sign = month + 1, "+" if forward else "-"
    total = number + n if forward else number - n
    steps = [f"{MONTHS[month]} is month {number}. {number} {sign} {n} = {total}."]
    while not 1 <= total <= 12:
        step = -12 if total > 12 else 12
        steps.append(f"{total} {'-' if step < 0 else '+'} 12 = {total + step}.")
        total += step
    answer = MONTHS[total - 1]
    reply = f"{' '.join(steps)} Month {total} is {answer}."
    question = DemoQuestion("weekdays and dates", casual(rng, prompt), answer=answer)
    return Example(question, reply, is_held_out("month offset", month, n, forward))


_KINDS = (weekday_offset, date_offset, leap_year, month_length, weekday_of_date, month_offset)
_SHARES = (4, 4, 2, 1, 4, 1)


def weekdays_and_dates(rng: Random) -> Example:
    """Any of the questions above."""
    return rng.choices(_KINDS, _SHARES)[0](rng)
