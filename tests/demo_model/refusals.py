"""Questions beyond the model, and the honest reply to them."""

from __future__ import annotations

from random import Random

from demo_model.example import Example, is_held_out
from demo_model.facts import CAPITALS
from demo_model.lexicon import NAMES, WORDS, made_up_word, words_of
from demo_model.wording import casual, fill, with_articles

from redshard.cluster.commands.demo_questions import DemoQuestion

I_AM_SMALL = "I am a small demo model"

_CAN_DO = (
    "I can do sums with small numbers, put words in order and name capitals.",
    "Ask me for a sum, a capital city or a short story instead.",
    "What I know is small sums, letters, dates, conversions and capitals.",
)

_LANGUAGES = words_of(
    "French German Spanish Italian Japanese Chinese Arabic Russian Hindi Turkish Swedish Greek"
)
_CODE = words_of("Python Java JavaScript Rust C++ Go SQL Ruby Haskell Swift HTML Bash")
_PEOPLE = (
    "the president",
    "the prime minister",
    "the king",
    "the queen",
    "the richest person",
    "the best singer",
    "the most famous actor",
    "the oldest person",
    "the best football player",
    "the first astronaut",
    "the greatest painter",
    "the author of the national anthem",
)
_SUBJECTS = (
    "quantum physics",
    "black holes",
    "the French Revolution",
    "photosynthesis",
    "inflation",
    "democracy",
    "machine learning",
    "neural networks",
    "evolution",
    "the stock market",
    "the Roman Empire",
    "philosophy",
    "vaccines",
    "climate change",
    "the Second World War",
    "gravity",
    "electricity",
    "blockchain",
    "opera",
    "chess",
    "relativity",
    "nuclear power",
    "the human brain",
    "volcanoes",
    "the Cold War",
    "DNA",
    "jazz",
    "the moon landing",
    "tectonic plates",
    "antibiotics",
    "the big bang",
    "probability",
    "cryptography",
    "the water cycle",
)
_LAWS = words_of(
    "taxes a_contract a_divorce my_landlord a_visa an_inheritance my_pension insurance a_loan a_mortgage"
)
_ILLS = (
    "a headache",
    "a fever",
    "back pain",
    "a cough",
    "a rash",
    "a sore throat",
    "high blood pressure",
    "toothache",
    "insomnia",
    "an allergy",
    "a broken arm",
    "a cold",
    "stomach ache",
    "dizziness",
)

#: What cannot be done, and questions that ask for it. Slots are filled in `_slots`.
_BEYOND = (
    (
        "know the weather",
        (
            "What is the weather [like|] in {city}[| today]?",
            "Will it [rain|snow] in {city} [tomorrow|today]?",
            "[What is|What's] the temperature [outside|now] in {city}?",
            "Do I need an umbrella in {city}?",
        ),
    ),
    (
        "know the news",
        (
            "What is the news from {place}?",
            "What happened in {place} [today|yesterday|last week|in {old_year}]?",
            "Who won the election in {place}?",
            "Tell me the latest news about {subject}.",
        ),
    ),
    (
        "write programs",
        (
            "Write [a|some] {code} [program|code|function] that [prints|sorts|counts|reads] {things}.",
            "How do I [open a file|write a loop|sort a list] in {code}?",
            "Debug [my|this] {code} code.",
            "Explain {code} to me.",
            "Write a {code} script for {things}.",
        ),
    ),
    (
        "translate",
        (
            "Translate {word} [to|into] {language}.",
            "How do you say {word} in {language}?",
            "What is {word} in {language}?",
            "What does {word} mean in {language}?",
            "Do you speak {language}?",
        ),
    ),
    (
        "tell you about people",
        (
            "Who is {person} of {place}?",
            "Who was {person} in {place}?",
            "How old is {person} of {place}?",
            "Tell me about {name}.",
            "Who is {name} {surname}?",
            "When was {name} {surname} born?",
        ),
    ),
    (
        "explain that",
        (
            "Explain {subject}[| to me| in simple words].",
            "What is {subject}?",
            "How does {subject} work?",
            "Tell me [about|something about] {subject}.",
            "Write an essay about {subject}.",
            "Summarize {subject}.",
        ),
    ),
    (
        "give medical advice",
        (
            "I have {ill}. What should I do?",
            "What helps against {ill}?",
            "Which medicine is good for {ill}?",
            "Is {ill} dangerous?",
        ),
    ),
    (
        "give legal or money advice",
        (
            "[Can|Could] you advise me about {law}?",
            "How do I deal with {law}?",
            "Should I [sign|cancel|worry about] {law}?",
            "Which stocks should I buy in {old_year}?",
            "How much will a {word} cost in {old_year}?",
        ),
    ),
    (
        "make pictures or sound",
        (
            "Draw [me |]a {word}.",
            "[Show|Send] me a [picture|photo|video] of a {word}.",
            "Sing [me |]a song about a {word}.",
            "Play some music by {name}.",
            "Paint a {word} and a {word2}.",
        ),
    ),
    (
        "use the internet or other programs",
        (
            "Search the [web|internet] for {things}.",
            "Open the website of {place}.",
            "Send an email to {name}.",
            "Call {name}.",
            "Set an alarm for {hour} o'clock.",
            "Book a [flight|hotel|train] to {city}.",
            "Order me a {word}.",
            "Turn on the {word}.",
            "Remind me to call {name}.",
            "Find a cheap {word} online.",
        ),
    ),
    (
        "tell what will come",
        (
            "Who will win the [world cup|election|race] in {year}?",
            "What will happen in {year}?",
            "Will I be [rich|famous|happy] in {year}?",
            "When will {name} call me?",
            "What are the lottery numbers for {city}?",
        ),
    ),
    (
        "tell you about a place",
        (
            "How many people live in {place}?",
            "How big is {place}?",
            "What is the [currency|population|flag|language|history|president|area] of {place}?",
            "What should I see in {city}?",
            "How far is {city} from {city2}?",
            "How do I get from {city} to {city2}?",
            "When was {city} founded?",
            "What is the best restaurant in {city}?",
        ),
    ),
    (
        "give recipes",
        (
            "How do I [cook|bake|make] a {word}?",
            "Give me a recipe [for|with] {word}.",
            "What can I cook with {word} and {word2}?",
        ),
    ),
    (
        "have an opinion",
        (
            "What do you think [of|about] {things}?",
            "Do you like {things}?",
            "Which is better, {word} or {word2}?",
            "What is your favorite {kind}?",
            "Should I buy a {word} or a {word2}?",
        ),
    ),
    (
        "explain words",
        (
            "What does the word {word} mean?",
            "Define {word}.",
            "What is a {word}?",
            "What is a synonym [of|for] {word}?",
            "Use {word} in a sentence.",
            "What rhymes with {word}?",
            "Why is a {word} called a {word}?",
        ),
    ),
    (
        "write long texts",
        (
            "Write a [poem|song|rap|sonnet|haiku|limerick] about {things}.",
            "Write [a letter|an email|a speech] to {name}.",
            "Write a [novel|book|film script] about {things}.",
            "Tell me a joke about {things}.",
            "Write a review of {things}.",
        ),
    ),
    (
        "work with numbers that large",
        (
            "What is {huge} [+|-|x|*|plus|minus|times] {huge2}?",
            "{huge} [+|-|*|x] {huge2}",
            "Multiply {huge} by {huge2}.",
            "Add {huge} and {huge2}.",
            "What is {three} [x|*|times] {three2}?",
            "Multiply {three} by {three2}.",
        ),
    ),
    (
        "work with more than two numbers",
        (
            "What is {small} + {small2} + {hour}?",
            "{small} - {small2} + {small3}",
            "What is {small} x {small2} + {small3}?",
            "Add {small}, {small2} and {small3}.",
            "{small} * {small2} * {hour}",
            "({small} + {small2}) * {hour}",
        ),
    ),
    (
        "divide or do higher mathematics",
        (
            "What is {small} [/|divided by] {small2}?",
            "{small} / {small2}",
            "Divide {small} by {small2}.",
            "[What is|Calculate] the square root of {small}.",
            "What is {small} percent of {small2}?",
            "What is {small} to the power of {small2}?",
            "Solve {small}x + {small2} = 0.",
            "What is the [sine|cosine|logarithm] of {small}?",
            "Is {small} a prime number?",
        ),
    ),
)

_UNKNOWN_COUNTRY = (
    "[What is|What's] the capital of {country}?",
    "Which city is the capital of {country}?",
    "What is the capital city of {country}?",
    "Name the capital of {country}.",
)
_KINDS_OF_THING = words_of("color food animal book film song season number city game sport word flower")


def _slots(rng: Random) -> dict[str, str]:
    """A value for every slot a wording may have."""
    places = tuple(CAPITALS)
    cities = tuple(CAPITALS.values())
    word, word2 = rng.sample(WORDS, 2)
    return {
        "city": rng.choice(cities),
        "city2": rng.choice(cities),
        "place": rng.choice(places),
        "person": rng.choice(_PEOPLE),
        "name": rng.choice(NAMES),
        "surname": made_up_word(rng).capitalize(),
        "word": word,
        "word2": word2,
        "things": rng.choice((f"a {word}", f"the {word}", f"{word} and {word2}", f"a {word} and a {word2}")),
        "kind": rng.choice(_KINDS_OF_THING),
        "language": rng.choice(_LANGUAGES),
        "code": rng.choice(_CODE),
        "subject": rng.choice(_SUBJECTS),
        "law": rng.choice(_LAWS).replace("_", " "),
        "ill": rng.choice(_ILLS),
        "hour": str(rng.randint(1, 12)),
        "old_year": str(rng.randint(1900, 2025)),
        "year": str(rng.randint(2026, 2100)),
        "huge": str(rng.randrange(10**4, 10 ** rng.randint(5, 9))),
        "huge2": str(rng.randrange(1, 10 ** rng.randint(1, 9))),
        "three": str(rng.randrange(100, 10000)),
        "three2": str(rng.randrange(11, 10000)),
        "small": str(rng.randrange(1, 1000)),
        "small3": str(rng.randrange(1, 1000)),
        "small2": str(rng.randrange(1, 100)),
    }


def _offer(deed: str) -> str:
    """What is offered instead of `deed`, always the same, so that the question settles the whole reply."""
    return Random(deed).choice(_CAN_DO)


def refusals(rng: Random) -> Example:
    """A question beyond the model, answered by saying so."""
    if rng.random() < 0.08:
        return _unknown_country(rng)
    deed, wordings = rng.choice(_BEYOND)
    template = rng.choice(wordings)
    prompt = with_articles(fill(rng, template, **_slots(rng)))
    question = DemoQuestion("refusals", casual(rng, prompt), mentions=(I_AM_SMALL,))
    reply = f"{I_AM_SMALL} and cannot {deed}. {_offer(deed)}"
    return Example(question, reply, is_held_out("refusal", prompt))


def _unknown_country(rng: Random) -> Example:
    country = made_up_word(rng).capitalize() + rng.choice(("ia", "land", "stan", "a", "", "o"))
    prompt = fill(rng, rng.choice(_UNKNOWN_COUNTRY), country=country)
    question = DemoQuestion("refusals", casual(rng, prompt), mentions=(I_AM_SMALL,))
    reply = f"{I_AM_SMALL} and do not know a country called {country}. {_offer('know the country')}"
    return Example(question, reply, is_held_out("country", country))
