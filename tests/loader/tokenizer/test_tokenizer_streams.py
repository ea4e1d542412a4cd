from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import CONTROL, byte_level_bpe, sentencepiece_bpe

from redshard.loader.tokenizer.detokenizer import StopMatcher, StreamDecoder
from redshard.loader.tokenizer.tokenizer import Tokenizer

BYTES = Tokenizer.from_metadata(byte_level_bpe([("Ã", "©")], special=(("<|end|>", CONTROL),), pre="gpt-2"))
PIECES = Tokenizer.from_metadata(sentencepiece_bpe(["▁a", "▁", "a", "é"]))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([BYTES, PIECES]), st.data(), st.booleans())
def test_any_stream_adds_up_to_decode(tokenizer: Tokenizer, data: st.DataObject, skip_special: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=40))
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip_special, continuation=True)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=20))
def test_no_character_is_ever_split(text: str) -> None:
    stream = StreamDecoder(BYTES)
    shown = ""
    for token_id in BYTES.encode(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.flush() == ""


def test_an_unfinished_character_is_replaced_at_the_end_only() -> None:
    stream = StreamDecoder(BYTES)
    assert [stream.push(token_id) for token_id in BYTES.encode("🤖")[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_stop_string_across_chunks() -> None:
    matcher = StopMatcher(["\n\n", "STOP"])
    assert [matcher.push(chunk) for chunk in ("one\n", "two ST", "AY ST", "OP more")] == [
        "one",
        "\ntwo ",
        "STAY ",
        "",
    ]
    assert matcher.matched == "STOP"
    assert matcher.push("more") == matcher.flush() == ""


def test_what_only_looked_like_a_stop_string_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("go STO") + "|" + matcher.flush() == "go |STO"
    assert matcher.matched is None


def test_no_stop_strings_hold_nothing_back() -> None:
    assert StopMatcher([]).push("text") == "text"


def test_stop_strings_see_what_is_hidden() -> None:
    matcher = StopMatcher(["<|user|>", "b<|x|>c"])
    assert matcher.push("a") == "a"
    assert matcher.push("<|x|>", hidden=True) == ""
    assert matcher.push("b") == ""
    assert matcher.push("<|x|>", hidden=True) == ""
    assert matcher.push("d") == "bd"
    assert matcher.push("e<|us", hidden=False) == "e"
    assert matcher.push("er|>") == ""
    assert matcher.matched == "<|user|>"
    hidden = StopMatcher(["<|user|>"])
    assert hidden.push("a") + hidden.push("<|user|>", hidden=True) == "a"
    assert hidden.matched == "<|user|>"


def test_many_long_stop_strings_cost_no_more_than_the_text() -> None:
    stops = ["ab" * 400 + str(i) for i in range(200)]
    matcher = StopMatcher(stops)
    text = "ab" * 300 + "c" + "xyz" * 1000
    began = time.process_time()
    assert matcher.push(text) + matcher.flush() == text
    assert time.process_time() - began < 5


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_chunks_make_no_difference(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(text)]
    matcher = StopMatcher(stops)
    out = "".join(matcher.push(text[begin:end]) for begin, end in itertools.pairwise(edges))
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if ends:
        _, begin, stop = min(ends)
        assert (out, matcher.matched) == (text[:begin], stop)
    else:
        assert matcher.matched is None
        assert out + matcher.flush() == text
