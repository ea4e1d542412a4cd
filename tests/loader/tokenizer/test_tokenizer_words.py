"""How each pre-tokenizer cuts text, and that none can be made to take quadratic time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from redshard.loader.tokenizer.pre_tokenizers import PRE_TOKENIZERS


def words(name: str, text: str) -> list[str]:
    stages = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    return [word for word, _ in pre_tokenizers.Sequence(stages).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'll  take 1234?!\n", ["I", "'ll", " ", " take", " 1234", "?!", "\n"]),
        ("starcoder", "x 12", ["x", " ", "1", "2"]),
        (
            "llama-bpe",
            "I'LL take 12345 (ok)\n\n x",
            ["I", "'LL", " take", " ", "123", "45", " (", "ok", ")\n\n", " x"],
        ),
        ("qwen2", "v12", ["v", "1", "2"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("qwen2", "हि", ["ह", "ि"]),
        ("gpt-4o", "parseHTTPResponse isn't", ["parse", "HTTPResponse", " isn't"]),
        ("tekken", "fooBar 42", ["foo", "Bar", " ", "4", "2"]),
        ("deepseek-v3", "x+=12345日本", ["x", "+=", "123", "45", "日本"]),
        ("deepseek-coder", "a 12\n", ["a", " ", "1", "2", "\n"]),
        ("deepseek-llm", "ab 123 日本", ["ab", " ", "123", " ", "日本"]),
        ("falcon", "a $1234", ["a", " ", "$", "123", "4"]),
        ("tiny_aya", "1234567 12ab", ["1", "234", "567", " ", "12", "ab"]),
        ("afmoe", "1234567", ["1", "234", "567"]),
        ("superbpe", "a b 12345", ["a b ", "12", "345"]),
        ("kimi-k2", "日本kana", ["日本", "kana"]),
        ("bloom", "a, b.", ["a", ",", " b", "."]),
        ("chameleon", "IMGIMGABZ  x1", ["IMGIMGABZ", "  ", "x", "1"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
    ],
)
def test_cuts(name: str, text: str, expected: list[str]) -> None:
    assert words(name, text) == expected


@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_nothing_is_lost(name: str, text: str) -> None:
    assert "".join(words(name, text)) == text


DISTINCT = sorted({pre_tokenizer.patterns: name for name, pre_tokenizer in PRE_TOKENIZERS.items()}.values())


@pytest.mark.parametrize("name", DISTINCT)
def test_time_is_linear(name: str) -> None:
    begun = time.process_time()
    for unit in ("1", "a", "A", "aB", " ", "\n", " \t", "!", "'", "1a", "e\u0301", "日", " 1"):
        words(name, unit * (20_000 // len(unit)) + "x")
    assert time.process_time() - begun < 10
