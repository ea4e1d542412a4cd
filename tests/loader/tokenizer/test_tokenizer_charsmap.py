from __future__ import annotations

import struct

from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import CONTROL, NORMAL, UNKNOWN, metadata, texts_of

from redshard.loader.tokenizer.charsmap import Charsmap
from redshard.loader.tokenizer.tokenizer import Tokenizer

RULES = {"ﬁ": "fi", "Ａ": "A", "e\u0301": "é", "e\u0301\u0302": "ê", "\t": " ", "\u200b": "", "ab": "B"}


def compiled(rules: dict[str, str]) -> bytes:
    """A precompiled character map: a double-array trie. The child by label c of a node is unit `base ^ c`,
    where the node's own unit gives `base`, unlike any other node's; label 0 holds the value.
    """
    replacements = bytearray()
    trie: dict[int, dict] = {}
    for key, replacement in rules.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(replacements)
        replacements += replacement.encode() + b"\0"
    units: dict[int, int] = {}
    used = {0}
    bases: set[int] = set()

    def place(at: int, node: dict, label: int) -> None:
        free = (base for base in range(1 << 20) if not {base ^ child for child in node} & used)
        base = next(base for base in free if base not in bases)
        bases.add(base)
        used.update(base ^ child for child in node)
        units[at] = (base ^ at) << 10 | (0 in node) << 8 | label
        for child, below in node.items():
            if child:
                place(base ^ child, below, child)
            else:
                units[base] = 1 << 31 | below

    place(0, trie, 0)
    trie_bytes = b"".join(struct.pack("<I", units.get(at, 0)) for at in range(max(used) + 1))
    return struct.pack("<I", len(trie_bytes)) + trie_bytes + bytes(replacements)


def replaced(text: str, rules: dict[str, str]) -> str:
    """The definition: at each place the longest rule, else the character itself."""
    out = ""
    while text:
        key = max((key for key in rules if text.startswith(key)), key=len, default="")
        out += rules[key] if key else text[0]
        text = text[len(key) or 1 :]
    return out


@settings(max_examples=200, deadline=None)
@given(st.text("abeﬁＡ\u0301\u0302\t\u200b日 ", max_size=30))
def test_agrees_with_the_definition(text: str) -> None:
    assert Charsmap(compiled(RULES)).apply(text) == replaced(text, RULES)


def test_no_map_changes_nothing() -> None:
    assert Charsmap(b"").apply("ﬁ\t") == "ﬁ\t"


def test_a_unigram_vocabulary_normalizes_with_its_map() -> None:
    tokens = [("<unk>", UNKNOWN, 0.0), ("</s>", CONTROL, 0.0), ("▁fi", NORMAL, -1.0), ("é", NORMAL, -2.0)]
    meta = metadata(
        "t5",
        tokens,
        unknown_token_id=0,
        eos_token_id=1,
        add_space_prefix=True,
        remove_extra_whitespaces=True,
        precompiled_charsmap=list(compiled(RULES)),
    )
    ids = Tokenizer.from_metadata(meta).encode("\tﬁe\u0301\t", add_end=True)
    assert texts_of(meta, ids) == ["▁fi", "é", "</s>"]
