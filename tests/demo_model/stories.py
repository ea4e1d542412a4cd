"""Short stories from a grammar."""

from __future__ import annotations

from random import Random

from demo_model.example import Example, is_held_out
from demo_model.lexicon import words_of
from demo_model.wording import casual, fill, with_articles

from redshard.cluster.commands.demo_questions import DemoQuestion

_HEROES = words_of(
    "fox rabbit bear owl mouse cat dog dragon wizard princess sailor baker robot farmer knight pirate frog "
    "hedgehog penguin turtle girl boy gardener painter fisherman squirrel wolf elephant tiger clown"
)
_NAMES = dict(
    zip(
        _HEROES,
        words_of(
            "Felix Bella Bruno Olga Mina Milo Max Igor Theo Sofia Jonas Rosa Kai Hans Victor Jack Frida Hugo "
            "Wei Selma Lucy Leo Iris Clara Omar Nina Ivan Ella Raj Oscar"
        ),
        strict=True,
    )
)
_HELPERS = words_of("crow old_woman beaver teacher blacksmith goose snail badger librarian shepherd moth")
_THINGS = words_of(
    "lantern key map ring book drum kite boat clock mirror crown compass bell flute cup umbrella hat basket "
    "letter coin feather seed violin cloak telescope"
)
_PLACES = words_of(
    "forest village castle harbor desert garden lighthouse market library valley meadow city cave "
    "mill orchard"
)
_TRAITS = words_of("small brave curious shy clever cheerful sleepy quiet kind proud lonely patient")

_ASK = (
    "[Tell|Write] me a [short |little |]story about a {hero} and a {thing}.",
    "[Write|Tell] a [short |little |]story [about|with] a {hero} and a {thing}.",
    "A story about a {hero} and a {thing}, please.",
    "Can you tell [me |]a story about a {hero}[ who finds| with| who loses] a {thing}?",
    "I want to hear a [short |]story about a {hero} and a {thing}.",
)
_ASK_OPEN = (
    "[Tell|Write] me a [short |little |]story.",
    "Tell me a [bedtime |]story, please.",
    "[Can you tell|Do you know] a story?",
)
_OPENING = (
    "Once upon a time a {trait} {hero} named {name} lived near a {place}.",
    "There once was a {trait} {hero} called {name}, who lived in a {place}.",
    "In a {place} far away lived a {trait} {hero}. Everybody called the {hero} {name}.",
)
_LOST = (
    "One day {name} lost a {thing}.",
    "One [morning|evening] {name} could not find the old {thing} anywhere.",
)
_FOUND = (
    "One day {name} found a {thing} that belonged to somebody else.",
    "One [morning|evening] {name} found a strange {thing} by the road.",
)
_SEARCH = (
    "{name} looked [under every stone|behind every door|from sunrise to sunset], but in vain.",
    "{name} asked everybody in the {place}, but nobody [knew|had seen] it.",
)
_WONDER = (
    "{name} asked everybody in the {place}, but nobody knew whose it was.",
    "{name} wanted to keep it, but it did not feel right.",
)
_HELP_LOST = (
    'Then a {helper} came by and said: "I saw your {thing} near the river." Together they found it.',
)
_HELP_FOUND = ('Then a {helper} came by, looking very sad. "That is my {thing}!" said the {helper}.',)
_END_LOST = (
    "{name} thanked the {helper}, and from then on they were friends.",
    "{name} was so happy that the whole {place} danced that night.",
)
_END_FOUND = (
    "{name} gave it back, and the {helper} smiled. From then on they were friends.",
    "{name} gave it back at once, and they had cake together until the stars came out.",
)
_MORAL = ("", "The end.", "And if you walk by, you may still hear them laugh.")


def _tell(hero: str, thing: str, lost: bool) -> str:
    """The story of `hero`, who lost or found `thing`, in five or six sentences.

    A hero always has the same name, character and home, and a thing the same adventure, so the question
    settles every word: were a phrase drawn anew each time, greedy decoding would meet ties that rounding
    decides.
    """
    of_hero, of_thing = Random(hero), Random(thing)
    words = {
        "hero": hero,
        "thing": thing,
        "name": _NAMES[hero],
        "trait": of_hero.choice(_TRAITS),
        "place": of_hero.choice(_PLACES),
        "helper": of_thing.choice(_HELPERS).replace("_", " "),
    }
    opening = fill(of_hero, of_hero.choice(_OPENING), **words)
    plot = (_LOST, _SEARCH, _HELP_LOST, _END_LOST) if lost else (_FOUND, _WONDER, _HELP_FOUND, _END_FOUND)
    adventure = [fill(of_thing, of_thing.choice(part), **words) for part in (*plot, _MORAL)]
    return with_articles(" ".join(filter(None, (opening, *adventure))))


def stories(rng: Random) -> Example:
    """A story about what was asked for, or the same one for whoever asks for any."""
    if rng.random() < 0.15:
        prompt, mentions = fill(rng, rng.choice(_ASK_OPEN)), ("lived",)
        reply = _tell(_HEROES[0], _THINGS[0], lost=True)
        return Example(DemoQuestion("stories", casual(rng, prompt), mentions=mentions), reply, False)
    hero, thing = rng.choice(_HEROES), rng.choice(_THINGS)
    prompt = with_articles(fill(rng, rng.choice(_ASK), hero=hero, thing=thing))
    lost = "who loses" in prompt or ("who finds" not in prompt and _THINGS.index(thing) % 2 == 0)
    question = DemoQuestion("stories", casual(rng, prompt), mentions=(hero, thing, "lived"))
    return Example(question, _tell(hero, thing, lost), is_held_out("story", hero, thing))
