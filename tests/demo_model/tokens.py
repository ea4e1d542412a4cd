"""The tokenizer: a byte-level BPE trained on the corpus, and chats as token ids.

`python -m demo_model.tokens` trains it and writes `tokenizer.json` beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from demo_model.corpus import training_chat
from demo_model.example import LETTER_BY_LETTER, Example
from demo_model.size import SHIPPED
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TOKENIZER_FILE = Path(__file__).with_name("tokenizer.json")
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

#: How Qwen2's tokenizer cuts text before BPE; digits stand alone. GGUF files name it `qwen2`.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: ChatML, as in the GGUF file.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(chats: int, seed: int) -> Tokenizer:
    """A byte-level BPE of the shipped vocabulary's size for the text of `chats` training chats."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHIPPED.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(chats, seed), trainer)
    return tokenizer


def _texts(chats: int, seed: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(chats):
        system, examples = training_chat(rng)
        yield f"system\n{system}" if system else "user\nassistant\n"
        for example in examples:
            yield example.question.prompt
            yield example.plain_reply


@cache
def load_tokenizer() -> Tokenizer:
    """The trained tokenizer."""
    return Tokenizer.from_file(str(TOKENIZER_FILE))


@cache
def _ids(text: str) -> tuple[int, ...]:
    return tuple(load_tokenizer().encode(text).ids)


def _letters(text: str) -> list[int]:
    """`text` as one token for each letter; a space goes with the letter after it."""
    letters = ["Ġ" + text[1], *text[2:]] if text.startswith(" ") else list(text)
    return [load_tokenizer().token_to_id(letter) for letter in letters]


def prompt_ids(prompt: str, system: str | None = None) -> list[int]:
    """The ids of a chat with one question, up to where the reply begins."""
    start = [*_ids(f"{TURN_START}system\n"), *_ids(system), *_ids(f"{TURN_END}\n")] if system else []
    question = load_tokenizer().encode(prompt).ids
    return [*start, *_ids(f"{TURN_START}user\n"), *question, *_ids(f"{TURN_END}\n{TURN_START}assistant\n")]


def reply_ids(reply: str) -> list[int]:
    """The ids of a reply, with what stands between `LETTER_BY_LETTER` marks cut into letters."""
    ids: list[int] = []
    for i, part in enumerate(reply.split(LETTER_BY_LETTER)):
        ids += _letters(part) if i % 2 else load_tokenizer().encode(part).ids
    return ids


def encode_chat(system: str | None, examples: list[Example]) -> tuple[list[int], list[bool]]:
    """Token ids of a whole chat, and for each whether it is part of a reply and so to be learned."""
    ids: list[int] = []
    learned: list[bool] = []
    for turn, example in enumerate(examples):
        question = prompt_ids(example.question.prompt, system if turn == 0 else None)
        reply = [*reply_ids(example.reply), *_ids(TURN_END)]
        ids += [*question, *reply, *_ids("\n")]
        learned += [False] * len(question) + [True] * len(reply) + [False]
    return ids, learned


def pack(rng: Random, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random training chats packed into rows, none cut: uint16 ids and the learned mask, each (rows, length).

    Best fit, longest first; the chats of a row are then shuffled, so that every kind comes first in some row.
    """
    chats: list[tuple[list[int], list[bool]]] = []
    total = 0
    while total < rows * length * 0.97:
        ids, learned = encode_chat(*training_chat(rng))
        if len(ids) <= length:
            chats.append((ids, learned))
            total += len(ids)
    chats.sort(key=lambda chat: -len(chat[0]))
    room = [length] * rows
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    by_room[length] = list(range(rows))
    placed: list[list[tuple[list[int], list[bool]]]] = [[] for _ in range(rows)]
    for chat in chats:
        fitting = next((r for r in range(len(chat[0]), length + 1) if by_room[r]), None)
        if fitting is None:
            continue
        row = by_room[fitting].pop()
        room[row] -= len(chat[0])
        by_room[room[row]].append(row)
        placed[row].append(chat)
    ids = np.full((rows, length), load_tokenizer().token_to_id(END_OF_TEXT), np.uint16)
    learned = np.zeros((rows, length), bool)
    for row, row_chats in enumerate(placed):
        rng.shuffle(row_chats)
        start = 0
        for chat_ids, chat_learned in row_chats:
            ids[row, start : start + len(chat_ids)] = chat_ids
            learned[row, start : start + len(chat_ids)] = chat_learned
            start += len(chat_ids)
    return ids, learned


if __name__ == "__main__":
    tokenizer = train_tokenizer(chats=200_000, seed=0)
    tokenizer.save(str(TOKENIZER_FILE), pretty=False)
    print(f"{tokenizer.get_vocab_size()} tokens in {TOKENIZER_FILE}")
