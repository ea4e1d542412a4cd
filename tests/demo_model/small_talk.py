"""Greetings and questions about the model itself."""

from __future__ import annotations

from random import Random

from demo_model.example import Example, is_held_out
from demo_model.lexicon import NAMES, made_up_word
from demo_model.wording import fill

from redshard.cluster.commands.demo_questions import DemoQuestion

_ABILITIES = (
    "I add, subtract and multiply small numbers, compare and sort, spell and count letters, "
    "convert temperatures and lengths, work with dates, name capitals and tell short stories."
)

_HELLO = "[Hi|Hello|Hey|Good morning|Good evening|Good day|Hi there|Hello there]"
_MY_NAME = "[my name is|I am|I'm|this is|they call me] {name}"
_NAMED = (
    f"{_HELLO}[, |! |. ]{_MY_NAME}[.|!|]",
    f"{_HELLO}, {_MY_NAME}. [How are you?|What can you do?|Nice to meet you.|Can you help me?]",
    "My name is {name}.",
    "I am {name}. [Who are you?|And you?]",
)

#: Wordings learned, wordings held out, and the reply.
_FIXED = (
    (
        (_HELLO + "[|!|.]", "[Greetings|Hi you|Hello you|Hey there|Good afternoon|Howdy][|!|.]"),
        ("Hello, demo model!", "Hi, model."),
        "Hello! Ask me a sum, a capital or anything else small.",
    ),
    (
        (
            "How are you[| today| doing]?",
            "[Hi|Hello|Hey], how are you[| today]?",
            "How is it going?",
            "Are you well?",
        ),
        ("How do you feel today?", "Hello there, are you doing well?"),
        "I am well, thank you. What would you like to know?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a [person|human|robot]?",
            "Introduce yourself.",
            "Who made you?",
            "Who trained you?",
            "Which model are you?",
            "Are you ChatGPT?",
        ),
        ("What sort of model are you?", "Please say who you are.", "Are you a human being?"),
        "I am a small demo model, trained from scratch for Redshard on rules and a table of facts.",
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "What are you able to do?",
            "Help!",
            "Help me.",
            "What should I ask you?",
            "What can I ask?",
            "Can you help me?",
        ),
        ("Tell me what you can do.", "What things can you help with?"),
        _ABILITIES,
    ),
    (
        (
            "[Thanks|Thank you|Thanks a lot|Many thanks|Thank you very much][|!|.]",
            "[Great|Good|Nice|Well done][, thanks|, thank you|][!|.]",
        ),
        ("Thank you so much for your help!", "Thanks, that was good."),
        "You are welcome.",
    ),
    (
        ("[Bye|Goodbye|See you|Good night|Bye bye|See you later|Farewell][|!|.]", "I have to go[| now]."),
        ("Goodbye, see you tomorrow!", "OK, bye for now."),
        "Goodbye!",
    ),
)


def greetings(rng: Random) -> Example:
    """A greeting with a name (split by name), or a set phrase (split by wording)."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES) if rng.random() < 0.6 else made_up_word(rng).capitalize()
        prompt = fill(rng, rng.choice(_NAMED), name=name)
        reply = f"Hello {name}! I am a small demo model. Ask me a sum, a capital or anything else small."
        question = DemoQuestion("greetings", prompt, mentions=(f"Hello {name}!",))
        return Example(question, reply, is_held_out("name", name))
    learned, kept, reply = rng.choice(_FIXED)
    held_out = rng.random() < 0.1
    prompt = fill(rng, rng.choice(kept if held_out else learned))
    if rng.random() < 0.2:
        prompt = prompt.lower()
    return Example(DemoQuestion("greetings", prompt, mentions=(reply,)), reply, held_out)
