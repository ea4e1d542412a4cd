"""Stop strings see special tokens, which are never part of the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import CONTROL, byte_level_bpe

from redshard.cluster.engine.text import TextStream
from redshard.loader.tokenizer.tokenizer import Tokenizer

SPECIAL = ("<|user|>", "<|a|>")
TOKENIZER = Tokenizer.from_metadata(
    byte_level_bpe([("a", "b")], special=tuple((name, CONTROL) for name in SPECIAL), pre="gpt-2")
)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False, parse_special=True)


def streamed(ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """The text up to the token that completes a stop string, and whether one did."""
    stream = TextStream(TOKENIZER, stop)
    text = ""
    for id_ in ids:
        text += stream.push(id_)
        if stream.stopped:
            break
    return text + stream.flush(), stream.stopped


@pytest.mark.parametrize(
    ("generated", "stop", "expected"),
    [
        ("ab<|user|>cd", ["<|user|>"], ("ab", True)),
        ("<|user|>" * 30, ["<|user|>"], ("", True)),
        ("ab<|user|>cd", ["b<|user|>c"], ("a", True)),
        ("ab<|user|><|a|>cd", ["<|user|><|a|>"], ("ab", True)),
        ("ab<|user|>cd", ["<|a|>"], ("abcd", False)),
        ("ab<|user|>", ["<|user|>x"], ("ab", False)),
        ("a<|user|>b", ["ab"], ("ab", False)),
        ("é<|user|>é", [], ("éé", False)),
    ],
)
def test_stop_strings_may_name_special_tokens(
    generated: str, stop: list[str], expected: tuple[str, bool]
) -> None:
    assert streamed(ids_of(generated), stop) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "<", "|", *SPECIAL]), max_size=10),
    st.lists(st.text("ab<|user>", min_size=1, max_size=6) | st.sampled_from(SPECIAL), max_size=3),
)
def test_the_text_is_all_before_the_first_stop_string_but_special_tokens(
    pieces: list[str], stops: list[str]
) -> None:
    ids = [id_ for piece in pieces for id_ in ids_of(piece)]
    shown = [(c, not TOKENIZER.is_special(id_)) for id_ in ids for c in TOKENIZER.token_bytes(id_).decode()]
    full = "".join(character for character, _ in shown)
    ends = [(full.find(stop) + len(stop), full.find(stop)) for stop in stops if stop in full]
    begin = min(ends)[1] if ends else len(full)
    assert streamed(ids, stops) == ("".join(c for c, visible in shown[:begin] if visible), bool(ends))
