"""Capitals of countries: facts, so the split is by wording, not by content."""

from __future__ import annotations

from random import Random

from demo_model.example import Example
from demo_model.facts import CAPITALS
from demo_model.wording import casual, fill

from redshard.cluster.commands.demo_questions import DemoQuestion

_CAPITAL_OF = (
    "[What is|What's] the capital of {country}?",
    "[What is|What's] the capital city of {country}?",
    "[Name|Give me|Tell me] the capital of {country}.",
    "Which city is the capital of {country}?",
    "Capital of {country}?",
    "the capital of {country}",
    "Do you know the capital of {country}?",
    "What is {country}'s capital?",
    "What city is the capital of {country}?",
    "{country}: what is the capital?",
    "What's {country}'s capital city?",
    "[Can|Could] you [tell me|name] the capital of {country}?",
    "Where is the government of {country}?",
    "I am going to {country}. What is the capital?",
    "In which city does the government of {country} sit?",
    "The capital of {country} is which city?",
    "The capital of {country} is called what?",
    "My friend lives in the capital of {country}. Which city is that?",
    "What do they call the capital of {country}?",
    "Geography quiz: the capital of {country}?",
    "What is the main city of {country}, its capital?",
    "{country} has which capital?",
    "Please name the capital city of {country}.",
    "I forgot the capital of {country}. What was it?",
)
_CAPITAL_OF_HELD_OUT = (
    "Which capital does {country} have?",
    "What is the name of the capital of {country}?",
    "Quick, the capital of {country}!",
    "If I visit the capital of {country}, which city am I in?",
    "Could you remind me what the capital of {country} is?",
    "What is the capital city called in {country}?",
)
_COUNTRY_OF = (
    "[Which|What] country has {capital} as its capital?",
    "{capital} is the capital of [which|what] country?",
    "[Which|What] country is {capital} the capital of?",
    "Of which country is {capital} the capital?",
    "Name the country whose capital is {capital}.",
    "{capital}: capital of which country?",
    "The capital is {capital}. [Which|What] country is it?",
    "In which country is {capital} the capital?",
    "Whose capital is {capital}?",
    "Tell me the country with the capital {capital}.",
)
_COUNTRY_OF_HELD_OUT = (
    "What is the country whose capital city is {capital}?",
    "If {capital} is the capital, what is the country?",
    "Which country's capital is {capital}?",
)


def capitals(rng: Random) -> Example:
    """The capital of a country, or the country of a capital."""
    country, capital = rng.choice(tuple(CAPITALS.items()))
    held_out = rng.random() < 0.1
    if rng.random() < 0.65:
        wordings, answer = (_CAPITAL_OF_HELD_OUT if held_out else _CAPITAL_OF), capital
        reply = f"The capital of {country} is {capital}."
    else:
        wordings, answer = (_COUNTRY_OF_HELD_OUT if held_out else _COUNTRY_OF), country
        reply = f"{capital} is the capital of {country}."
    prompt = fill(rng, rng.choice(wordings), country=country, capital=capital)
    question = DemoQuestion("capitals", casual(rng, prompt[0].upper() + prompt[1:]), answer=answer)
    return Example(question, reply, held_out)
