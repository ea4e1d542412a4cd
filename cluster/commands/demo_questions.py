"""Questions for the demo model with their true answers, and the check of a reply."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """A question and what makes a reply to it right.

    `answer` is what the reply must end with, its final full stop aside; `mentions` is what it must contain.
    Either may be empty.
    """

    task: str
    prompt: str
    answer: str = ""
    mentions: tuple[str, ...] = ()


def is_right(question: DemoQuestion, reply: str) -> bool:
    """Whether `reply` ends with the answer, as a whole word or number, and mentions what it must."""
    text = reply.strip().rstrip(".!").lower()
    ending = rf"(?<![\w.-]){re.escape(question.answer.lower())}$" if question.answer else ""
    mentioned = all(phrase.lower().rstrip(".!") in text for phrase in question.mentions)
    return mentioned and re.search(ending, text) is not None


#: Held out from the demo model's training: it never saw what these are about or, for capitals and set
#: phrases, this wording. Written by tests/demo_model/questions.py.
QUESTIONS: tuple[DemoQuestion, ...] = (
    DemoQuestion("greetings", "My name is Ines.", mentions=("Hello Ines!",)),
    DemoQuestion("addition", "What is 210 plus 64?", answer="274"),
    DemoQuestion("addition", "How much is 3924 + 176?", answer="4100"),
    DemoQuestion(
        "addition",
        "A school had 9162 visitors on Monday and 9 on Tuesday. How many in all?",
        answer="9171",
    ),
    DemoQuestion("addition", "Jana has 922 coins and gets 56 more. How many is that?", answer="978"),
    DemoQuestion("subtraction", "Take 2669 away from 8195.", answer="5526"),
    DemoQuestion("subtraction", "Find the difference between 84 and 56.", answer="28"),
    DemoQuestion("subtraction", "What is the result if you subtract 52 from 6907?", answer="6855"),
    DemoQuestion("subtraction", "A bakery had 3489 cakes and sold 31. How many remain?", answer="3458"),
    DemoQuestion(
        "multiplication",
        "There are 20 boxes with 58 eggs each. How many eggs are there?",
        answer="1160",
    ),
    DemoQuestion(
        "multiplication",
        "Yara buys 94 tickets at 93 coins each. How many coins is that?",
        answer="8742",
    ),
    DemoQuestion("multiplication", "Multiply 31 by 40.", answer="1240"),
    DemoQuestion("multiplication", "What is the product of 28 and 75.", answer="2100"),
    DemoQuestion("comparing", "Compare 7 and 2720. Which is smaller?", answer="7"),
    DemoQuestion("comparing", "Which is lower, 4822 or 602?", answer="602"),
    DemoQuestion("sorting numbers", "Put 4403, 853, 866 in increasing order.", answer="853, 866, 4403"),
    DemoQuestion(
        "sorting numbers",
        "Sort these numbers: 21, 18, 4410, 3987, 63.",
        answer="18, 21, 63, 3987, 4410",
    ),
    DemoQuestion(
        "sorting numbers",
        "Arrange the numbers in descending order: 47, 51, 56, 427.",
        answer="427, 56, 51, 47",
    ),
    DemoQuestion(
        "sorting words",
        "Sort pan, cheap, dig, merchant alphabetically.",
        answer="cheap, dig, merchant, pan",
    ),
    DemoQuestion(
        "sorting words",
        "List these words in alphabetical order: ferry, yawn, kettle.",
        answer="ferry, kettle, yawn",
    ),
    DemoQuestion(
        "sorting words",
        "Put these words in alphabetical order: pepper, lagoon, save.",
        answer="lagoon, pepper, save",
    ),
    DemoQuestion("reversing", "How do you write 'tulip' backwards?", answer="pilut"),
    DemoQuestion("reversing", "Reverse 'vine'.", answer="eniv"),
    DemoQuestion("reversing", "What is guard in reverse?", answer="draug"),
    DemoQuestion("counting letters", 'How many letters are in the word "science"?', answer="7 letters"),
    DemoQuestion("counting letters", "Count the vowels of arena.", answer="3 vowels"),
    DemoQuestion("counting letters", "How often is the letter j used in 'pie'?", answer="0 times"),
    DemoQuestion("temperature", "What is 461 degrees C in F?", answer="861.8 °F"),
    DemoQuestion("temperature", "Convert -81 degrees C to degrees F.", answer="-113.8 °F"),
    DemoQuestion("temperature", "How many K is 648 degrees C?", answer="921.15 K"),
    DemoQuestion("length", "What is 258 yards in feet?", answer="774 feet"),
    DemoQuestion("length", "Change 132 yards into feet.", answer="396 feet"),
    DemoQuestion("length", "How many kilometers are 247 miles?", answer="397.423 km"),
    DemoQuestion("weekdays and dates", "What day is 16 days before Sunday?", answer="Friday"),
    DemoQuestion("weekdays and dates", "On what day did 16 March 2018 fall?", answer="Friday"),
    DemoQuestion("weekdays and dates", "Which weekday comes 33 days after Friday?", answer="Wednesday"),
    DemoQuestion("weekdays and dates", "How many days has February 2001?", answer="28 days"),
    DemoQuestion(
        "capitals",
        "What is the name of the capital of the Central African Republic?",
        answer="Bangui",
    ),
    DemoQuestion("capitals", "Which country's capital is Zagreb?", answer="Croatia"),
    DemoQuestion("capitals", "If Honiara is the capital, what is the country?", answer="the Solomon Islands"),
    DemoQuestion("capitals", "Could you remind me what the capital of Paraguay is?", answer="Asuncion"),
    DemoQuestion("refusals", "What is 295 + 45 + 1?", mentions=("I am a small demo model",)),
    DemoQuestion("refusals", "Who is the king of South Korea?", mentions=("I am a small demo model",)),
    DemoQuestion(
        "stories",
        "I want to hear a short story about a wizard and a telescope.",
        mentions=("wizard", "telescope", "lived"),
    ),
)
