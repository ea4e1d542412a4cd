"""Words as letters: alphabetical order, reversing, counting."""

from __future__ import annotations

from random import Random

from demo_model.arithmetic import insertion_steps
from demo_model.example import Example, is_held_out, spell
from demo_model.lexicon import WORDS, any_word
from demo_model.wording import casual, fill

from redshard.cluster.commands.demo_questions import DemoQuestion

_SORT = (
    "[Sort|Order|Arrange] [these words|the words|] "
    "[alphabetically|in alphabetical order|from A to Z]: {items}[|.]",
    "[Sort|Order|Arrange] {items} [alphabetically|in alphabetical order|from A to Z][|.]",
    "Put {items} in [alphabetical|dictionary] order[|.]",
    "[Put|List] these words in alphabetical order: {items}[|.]",
)
_REVERSE = (
    "[Reverse|Flip] [the word|] {word}[|.]",
    "[Write|Spell|Say] [the word|] {word} backwards[|.]",
    "What is {word} [spelled backwards|backwards|in reverse|reversed]?",
    "How do you [write|spell] {word} backwards?",
    "[Reverse|Turn around] the letters of {word}[|.]",
)
_REVERSE_ORDER = (
    "[Write|List|Say] these words in reverse order: {items}[|.]",
    "Reverse the order of [these words|this list]: {items}[|.]",
    "[Turn this list around|Reverse this list]: {items}[|.]",
)
_COUNT_ONE = (
    "How many times does [the letter|] {letter} [appear|occur] in [the word|] {word}?",
    "How many {letter}'s are [there in|in] [the word|] {word}?",
    "Count the letter {letter} in [the word|] {word}[|.]",
    "How often [is|does] the letter {letter} [used|come up] in {word}?",
)
_COUNT_ALL = (
    "How many letters [are in|are there in|has] [the word|] {word}?",
    "How many letters does {word} have?",
    "Count the letters [in|of] [the word|] {word}[|.]",
    "How long is the word {word}?",
)
_COUNT_VOWELS = (
    "How many vowels [are in|are there in|has] [the word|] {word}?",
    "Count the vowels [in|of] [the word|] {word}[|.]",
)


def _quoted(rng: Random, word: str) -> str:
    return rng.choice((word, word, f'"{word}"', f"'{word}'"))


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def sorting_words(rng: Random) -> Example:
    """Three to five words put in alphabetical order."""
    words = rng.sample(WORDS, rng.randint(3, 5))
    prompt = fill(rng, rng.choice(_SORT), items=", ".join(words)).replace("  ", " ")
    reply = insertion_steps(words, key=str)
    question = DemoQuestion("sorting words", casual(rng, prompt), answer=", ".join(sorted(words)))
    return Example(question, reply, is_held_out("alphabet", *sorted(words)))


def reversing(rng: Random) -> Example:
    """A word written backwards, or a list of words in reverse order."""
    if rng.random() < 0.2:
        words = rng.sample(WORDS, rng.randint(3, 6))
        prompt = fill(rng, rng.choice(_REVERSE_ORDER), items=", ".join(words))
        answer = ", ".join(reversed(words))
        question = DemoQuestion("reversing", casual(rng, prompt), answer=answer)
        return Example(question, f"From last to first: {answer}.", is_held_out("list", *sorted(words)))
    word = any_word(rng)
    prompt = fill(rng, rng.choice(_REVERSE), word=_quoted(rng, word)).replace("  ", " ")
    backwards = word[::-1]
    spelled = f"Spelled out: {' '.join(word)}. Backwards: {' '.join(backwards)}."
    reply = f"{spelled} So {word} reversed is{spell(backwards)}."
    return Example(
        DemoQuestion("reversing", casual(rng, prompt), answer=backwards), reply, is_held_out("word", word)
    )


def _numbered(word: str, counted: str) -> tuple[str, int]:
    """`word` spelled out with a running number after each letter of `counted`, and the last number."""
    spelled, count = [], 0
    for letter in word:
        if letter in counted:
            count += 1
            spelled.append(f"{letter} ({count})")
        else:
            spelled.append(letter)
    return ", ".join(spelled), count


def counting_letters(rng: Random) -> Example:
    """How often a letter comes in a word, how many letters or vowels it has."""
    word = any_word(rng)
    kind = rng.random()
    if kind < 0.5:
        letter = rng.choice(word if rng.random() < 0.75 else "abcdefghijklmnopqrstuvwxyz")
        spelled, count = _numbered(word, letter)
        prompt = fill(rng, rng.choice(_COUNT_ONE), word=_quoted(rng, word), letter=letter)
        answer = _times(count, "time")
        reply = f"Spelled out: {spelled}. So the letter {letter} appears {answer}."
    elif kind < 0.8:
        spelled, count = _numbered(word, word)
        prompt = fill(rng, rng.choice(_COUNT_ALL), word=_quoted(rng, word))
        answer = _times(count, "letter")
        reply = f"Spelled out: {spelled}. So {word} has {answer}."
    else:
        spelled, count = _numbered(word, "aeiou")
        prompt = fill(rng, rng.choice(_COUNT_VOWELS), word=_quoted(rng, word))
        answer = _times(count, "vowel")
        reply = f"Spelled out: {spelled}. So {word} has {answer}."
    prompt = casual(rng, prompt.replace("  ", " "))
    return Example(DemoQuestion("counting letters", prompt, answer=answer), reply, is_held_out("word", word))
