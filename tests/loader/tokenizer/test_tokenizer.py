from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vocabularies import (
    ALPHABET,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_level_bpe,
    id_of,
    merged_by_rank,
    merged_by_score,
    metadata,
    sentencepiece_bpe,
    texts_of,
)

from redshard.loader.tokenizer.tokenizer import Tokenizer
from redshard.loader.tokenizer.vocabulary import TokenizerError

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)

PIECES = ["▁▁", "th", "the", "▁the", "▁a", "an", "▁t", "in", "▁an", "ing", "aa", "na", "▁", *"abeghint", "é"]
SENTENCEPIECE = sentencepiece_bpe(PIECES)

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("in", "g"), ("a", "a"), ("1", "2"), ("12", "3")]
MERGES += [("Ã", "©"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("'", "s")]
BYTE_LEVEL = byte_level_bpe(
    MERGES,
    special=(("<|end|>", CONTROL), ("<mark>", USER_DEFINED), ("<mark>s", USER_DEFINED)),
    pre="gpt-2",
)


def encoded(meta: dict[str, Any], text: str, **options: bool) -> list[str]:
    """With the tokens at both ends, unless told otherwise."""
    options = {"add_end": True} | options
    return texts_of(meta, Tokenizer.from_metadata(meta).encode(text, **options))


class TestSentencePieceBpe:
    def test_joins_the_highest_score_first(self) -> None:
        assert encoded(SENTENCEPIECE, "the thing", add_special=False) == ["▁the", "▁", "th", "ing"]

    def test_spells_unknown_characters_in_bytes(self) -> None:
        assert encoded(SENTENCEPIECE, "é語", add_special=False) == ["▁", "é", "<0xE8>", "<0xAA>", "<0x9E>"]

    def test_adds_begin_of_sequence_unless_told_otherwise(self) -> None:
        assert encoded(SENTENCEPIECE, "a") == ["<s>", "▁a"]
        assert encoded(
            sentencepiece_bpe(PIECES, add_bos_token=False, add_eos_token=True), "a", add_end=True
        ) == [
            "▁a",
            "</s>",
        ]

    def test_a_prompt_to_be_continued_has_no_end_token(self) -> None:
        meta = sentencepiece_bpe(PIECES, add_eos_token=True)
        assert texts_of(meta, Tokenizer.from_metadata(meta).encode("a")) == ["<s>", "▁a"]

    def test_does_not_double_begin_of_sequence(self) -> None:
        assert encoded(SENTENCEPIECE, "<s>a", parse_special=True) == ["<s>", "▁a"]

    def test_empty_text(self) -> None:
        assert encoded(SENTENCEPIECE, "") == ["<s>"]
        assert encoded(SENTENCEPIECE, "", add_special=False) == []

    def test_without_space_prefix(self) -> None:
        assert encoded(sentencepiece_bpe(PIECES, add_space_prefix=False), "the", add_special=False) == ["the"]

    def test_without_byte_tokens_falls_back_to_unknown(self) -> None:
        meta = metadata("llama", [("<unk>", UNKNOWN, 0.0), ("▁", NORMAL, -1.0), ("a", NORMAL, -2.0)])
        assert encoded(meta, "a!", add_special=False) == ["▁", "a", "<unk>"]

    def test_equal_scores_join_the_leftmost(self) -> None:
        pieces = [("▁", NORMAL, 0.0), ("a", NORMAL, 0.0), ("aa", NORMAL, 5.0), ("aaa", NORMAL, 5.0)]
        meta = metadata("llama", [("<unk>", UNKNOWN, 0.0), *pieces])
        assert encoded(meta, "aaaaa", add_special=False) == ["▁", "aaa", "aa"]

    @settings(max_examples=100, deadline=None)
    @given(st.text("abeghint é語", max_size=30))
    def test_agrees_with_the_definition(self, text: str) -> None:
        scores = {piece: float(-rank) for rank, piece in enumerate(PIECES)}
        expected: list[str] = []
        for symbol in merged_by_score(list("▁" + text.replace(" ", "▁")), scores) if text else []:
            expected += [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        assert encoded(SENTENCEPIECE, text, add_special=False) == expected

    @settings(max_examples=100, deadline=None)
    @given(ANY_TEXT)
    def test_round_trip(self, text: str) -> None:
        tokenizer = Tokenizer.from_metadata(SENTENCEPIECE)
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")

    def test_a_long_word_takes_no_quadratic_time(self) -> None:
        tokenizer = Tokenizer.from_metadata(SENTENCEPIECE)
        begun = time.process_time()
        assert len(tokenizer.encode("an" * 50_000)) > 10_000
        assert time.process_time() - begun < 10


class TestByteLevelBpe:
    def test_merges_inside_words_only(self) -> None:
        assert encoded(BYTE_LEVEL, "the thing's 123") == ["t", "he", "Ġt", "h", "ing", "'s", "Ġ", "123"]

    def test_user_defined_tokens_are_always_found_longest_first(self) -> None:
        assert encoded(BYTE_LEVEL, "a<mark>a<mark>s") == ["a", "<mark>", "a", "<mark>s"]

    def test_control_tokens_only_when_asked(self) -> None:
        assert encoded(BYTE_LEVEL, "a<|end|>", parse_special=True) == ["a", "<|end|>"]
        assert encoded(BYTE_LEVEL, "a<|end|>") == ["a", *"<|end|>"]

    @settings(max_examples=100, deadline=None)
    @given(ANY_TEXT)
    def test_round_trip(self, text: str) -> None:
        tokenizer = Tokenizer.from_metadata(BYTE_LEVEL)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @settings(max_examples=100, deadline=None)
    @given(st.text("thein ga'sé ", max_size=30))
    def test_agrees_with_the_definition(self, text: str) -> None:
        meta = byte_level_bpe(MERGES, pre="superbpe")  # cuts at digits only
        symbols = [ALPHABET[byte] for byte in text.encode()]
        assert encoded(meta, text) == merged_by_rank(symbols, MERGES)

    def test_ignore_merges_takes_a_whole_word(self) -> None:
        special = (("hello", NORMAL),)
        assert encoded(byte_level_bpe(MERGES, special=special, pre="llama-bpe"), "hello") == ["hello"]
        assert encoded(byte_level_bpe(MERGES, special=special, pre="gpt-2"), "hello") == ["he", "l", "l", "o"]

    def test_merges_that_name_no_tokens_are_passed_over(self) -> None:
        meta = dict(BYTE_LEVEL)
        meta["tokenizer.ggml.merges"] = ["no such", "zz", *meta["tokenizer.ggml.merges"]]
        assert encoded(meta, "the") == ["t", "he"]

    def test_missing_pre_tokenizer_is_default_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            assert encoded(byte_level_bpe(MERGES), "the $1234") == ["t", "he", "Ġ", "$", "123", "4"]
        assert "tokenizer.ggml.pre" in caplog.text

    def test_lone_surrogates_become_replacement_characters(self) -> None:
        tokenizer = Tokenizer.from_metadata(BYTE_LEVEL)
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert tokenizer.decode(tokenizer.encode("\ud83e\udd16")) == "\U0001f916"


def test_raw_bpe_with_spaces_as_pieces() -> None:
    tokens = ["<bos>", "▁", "a", "b", "▁a", "\n", "\n\n"]
    meta = metadata(
        "gemma4",
        [(text, CONTROL if text == "<bos>" else NORMAL, 0.0) for text in tokens] + [("<0x63>", BYTE, 0.0)],
        merges=["▁ a", "\n \n"],
        bos_token_id=0,
    )
    assert encoded(meta, "b a\n\nc") == ["<bos>", "b", "▁a", "\n\n", "<0x63>"]
    tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.decode(tokenizer.encode("b a\n\nc")) == "b a\n\nc"


class TestWordPiece:
    TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁un", "aff", "able", "▁,", "▁a", "▁e", "▁日")
    META = metadata(
        "bert",
        [(text, CONTROL if text.startswith("[") else NORMAL, 0.0) for text in TOKENS],
        unknown_token_id=1,
        cls_token_id=2,
        seperator_token_id=3,
    )

    def test_longest_piece_from_the_left(self) -> None:
        assert encoded(self.META, "Unaffable, xyz") == ["[CLS]", "▁un", "aff", "able", "▁,", "[UNK]", "[SEP]"]

    def test_normalizes(self) -> None:
        assert encoded(self.META, "É日a", add_special=False) == ["▁e", "▁日", "▁a"]

    def test_keeps_case_when_the_file_says_so(self) -> None:
        meta = {**self.META, "tokenizer.ggml.normalizer.lowercase": False}
        assert encoded(meta, "a A", add_special=False) == ["▁a", "[UNK]"]

    def test_decodes_words_with_spaces(self) -> None:
        tokenizer = Tokenizer.from_metadata(self.META)
        assert tokenizer.decode(tokenizer.encode("unaffable a")) == "unaffable a"


class TestUnigram:
    PIECES = (
        ("▁", -3.0),
        ("▁he", -2.0),
        ("l", -4.0),
        ("lo", -3.0),
        ("llo", -3.5),
        ("▁hell", -4.0),
        ("o", -5.0),
    )
    META = metadata(
        "t5",
        [("<pad>", CONTROL, 0.0), ("</s>", CONTROL, 0.0), ("<unk>", UNKNOWN, 0.0)]
        + [(piece, NORMAL, score) for piece, score in PIECES],
        add_space_prefix=True,
        remove_extra_whitespaces=True,
    )

    def test_takes_the_highest_sum_of_scores(self) -> None:
        assert encoded(self.META, "hello") == ["▁he", "llo", "</s>"]

    def test_merges_spaces_and_unknown_characters(self) -> None:
        assert encoded(self.META, "  lo   xyz o ", add_special=False) == ["▁", "lo", "▁", "<unk>", "▁", "o"]

    def test_control_tokens_are_no_text(self) -> None:
        assert encoded(self.META, "</s>", add_special=False) == ["▁", "<unk>"]
        assert encoded(self.META, "</s>", add_special=False, parse_special=True) == ["</s>"]


def test_rwkv_takes_the_longest_bytes() -> None:
    texts = ["<s>", "a", "ab", "abc", r"\n", r"\xe6", r"\\", r"\x97\xa5", "abcde"]
    meta = metadata("rwkv", [(text, NORMAL, 0.0) for text in texts])
    tokenizer = Tokenizer.from_metadata(meta)
    assert texts_of(meta, tokenizer.encode("abcdab\n日\\")) == [
        "abc",
        "ab",
        r"\n",
        r"\xe6",
        r"\x97\xa5",
        r"\\",
    ]
    assert tokenizer.decode(tokenizer.encode("ab\n日")) == "ab\n日"


class TestSpecialTokens:
    def test_roles_and_ends_of_generation(self) -> None:
        special = (("<|im_end|>", CONTROL), ("<|im_start|>", CONTROL), ("<stop>", CONTROL), ("</s>", NORMAL))
        meta = byte_level_bpe(MERGES, special=special, pre="qwen2")
        meta["tokenizer.ggml.eos_token_id"] = id_of(meta, "<stop>")
        meta["tokenizer.ggml.bos_token_id"] = id_of(meta, "<|im_start|>")
        tokenizer = Tokenizer.from_metadata(meta)
        assert tokenizer.eos_id == id_of(meta, "<stop>")
        assert tokenizer.bos_id == id_of(meta, "<|im_start|>")
        assert tokenizer.eog_ids == {id_of(meta, "<|im_end|>"), id_of(meta, "<stop>")}
        assert tokenizer.n_vocab == len(meta["tokenizer.ggml.tokens"])
        assert tokenizer.is_special(id_of(meta, "<|im_end|>"))
        assert not tokenizer.is_special(id_of(meta, "a"))

    def test_an_end_that_a_file_calls_ordinary_is_still_special(self) -> None:
        meta = byte_level_bpe(MERGES, special=(("<|im_end|>", NORMAL),), pre="qwen2")
        tokenizer = Tokenizer.from_metadata(meta)
        assert tokenizer.is_special(id_of(meta, "<|im_end|>"))
        assert tokenizer.eog_ids == {id_of(meta, "<|im_end|>")}

    def test_an_end_of_message_inside_a_turn_ends_nothing(self) -> None:
        special = tuple((text, CONTROL) for text in ("<|end|>", "<|return|>", "<|call|>"))
        meta = byte_level_bpe(MERGES, special=special, pre="gpt-4o")
        assert id_of(meta, "<|end|>") not in Tokenizer.from_metadata(meta).eog_ids

    def test_decode_leaves_special_tokens_out_or_names_them(self) -> None:
        tokenizer = Tokenizer.from_metadata(BYTE_LEVEL)
        ids = tokenizer.encode("a<|end|>b", parse_special=True)
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.decode(ids, skip_special=False) == "a<|end|>b"

    def test_a_leading_space_belongs_to_a_continuation(self) -> None:
        tokenizer = Tokenizer.from_metadata(SENTENCEPIECE)
        ids = tokenizer.encode("the", add_special=False)
        assert tokenizer.decode(ids) == "the"
        assert tokenizer.decode(ids, continuation=True) == " the"

    def test_white_space_after_the_special_tokens_of_phi3_vanishes(self) -> None:
        meta = sentencepiece_bpe(PIECES, controls=("<|user|>",))
        meta["general.name"] = "Phi-3 mini"
        assert encoded(meta, "<|user|>\n a", parse_special=True) == ["<s>", "<|user|>", "▁a"]

    def test_ids_out_of_range_are_refused(self) -> None:
        tokenizer = Tokenizer.from_metadata(BYTE_LEVEL)
        for call in (tokenizer.token_bytes, tokenizer.is_special, lambda id_: tokenizer.decode([id_])):
            for id_ in (-1, tokenizer.n_vocab):
                with pytest.raises(ValueError, match="not in the vocabulary"):
                    call(id_)

    def test_role_ids_out_of_range_are_ignored(self) -> None:
        assert Tokenizer.from_metadata({**BYTE_LEVEL, "tokenizer.ggml.eos_token_id": 10**9}).eos_id is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": None}, "has no tokenizer"),
        ({"tokenizer.ggml.model": "none"}, "has no tokenizer"),
        ({"tokenizer.ggml.model": "alien"}, "'alien' is not supported; supported are llama, gpt2"),
        ({"tokenizer.ggml.pre": "alien"}, "'alien'.*is not known; known are"),
        ({"tokenizer.ggml.tokens": None}, "must be an array"),
        ({"tokenizer.ggml.tokens": []}, "missing or empty"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "array of strings"),
        ({"tokenizer.ggml.token_type": [1]}, "has 1 entries for"),
        ({"tokenizer.ggml.merges": []}, "needs tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": 3}, "must be an array"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "must be true or false"),
    ],
)
def test_broken_metadata_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata({**BYTE_LEVEL, **changes})
