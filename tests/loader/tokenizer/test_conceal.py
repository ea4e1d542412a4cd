"""Text of strangers never becomes control tokens, and encodes as it would alone."""

from __future__ import annotations

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import CONTROL, NORMAL, USER_DEFINED, metadata

from redshard.loader.tokenizer.chat_template import ChatTemplate
from redshard.loader.tokenizer.tokenizer import Tokenizer

CONTROLS = ["<s>", "</s>", "<|user|>", "<|im_end|>", "<|im_end|>x", "[INST]", "[/INST]"]
LETTERS = [*map(chr, range(32, 127)), "<think>", "Ġ", "Ċ", "é"]


@cache
def tokenizer() -> Tokenizer:
    tokens = [(text, CONTROL, 0.0) for text in CONTROLS]
    tokens += [(text, USER_DEFINED if text == "<think>" else NORMAL, 0.0) for text in LETTERS]
    return Tokenizer.from_metadata(metadata("gpt2", tokens, pre="default", merges=["a b"]))


PIECES = st.lists(
    st.sampled_from([*CONTROLS, "<", "<|", "|>", "[", "im_end", "<think>", "a", "b ", " "]), max_size=8
)
FIRST = set(range(len(CONTROLS)))
TEMPLATE = ChatTemplate(
    {
        "default": "{% for m in messages %}<|user|>{{ m.content | trim }}{{ m.note }}<|im_end|>{% endfor %}"
        "{{ tools | tojson }}[INST]"
    },
    {},
)


@settings(max_examples=300, deadline=None)
@given(PIECES, PIECES)
def test_concealed_text_has_no_control_tokens_and_is_otherwise_the_same(
    left: list[str], right: list[str]
) -> None:
    texts = ["".join(left), "".join(right)]
    concealed = [tokenizer().conceal(text) for text in texts]
    assert list(map(len, concealed)) == list(map(len, texts))
    for n in (1, 2):  # alone, and with another stranger's text right behind it
        ids = tokenizer().encode("".join(concealed[:n]), parse_special=True)
        assert ids == tokenizer().encode("".join(texts[:n]))
        assert not FIRST & set(ids)


@settings(max_examples=60, deadline=None)
@given(PIECES, PIECES)
def test_only_the_template_writes_control_tokens(content: list[str], note: list[str]) -> None:
    message = {"role": "user", "content": "".join(content), "note": "".join(note)}
    variables = {"tools": [{"name": "".join(note)}]}
    prompt = TEMPLATE.render([message, message], conceal=tokenizer().conceal, **variables)
    ids = tokenizer().encode(prompt, parse_special=True)
    assert [id_ for id_ in ids if id_ in FIRST] == [2, 3, 2, 3, 5]
    old_way = TEMPLATE.render([message, message], **variables)
    assert tokenizer().decode(ids, skip_special=False, continuation=True) == old_way
