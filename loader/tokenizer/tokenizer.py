"""Text to token ids and back, from a GGUF file's metadata alone.

`Tokenizer.from_metadata` picks the model that `tokenizer.ggml.model` names. What is common to all of them is
here: special tokens in the text, the tokens added at both ends, and the bytes that an id stands for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from redshard.loader.tokenizer.marked_text import MarkedText, marks_of, unmarked
from redshard.loader.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from redshard.loader.tokenizer.subword_models import (
    SPACE,
    BpeModel,
    RwkvModel,
    SentencePieceBpeModel,
    SubwordModel,
    UnigramModel,
    WordPieceModel,
    byte_alphabet,
    unescape_rwkv,
)
from redshard.loader.tokenizer.vocabulary import TokenizerError, TokenType, Vocabulary, read_strings

logger = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ASCII_SPACES = re.compile(r"[ \t\n\v\f\r]*")
_BYTE_OF = {character: bytes([byte]) for byte, character in enumerate(byte_alphabet())}


def _spelled_in_bytes(token: str) -> bytes:
    return b"".join(_BYTE_OF.get(character) or character.encode() for character in token)


def _spelled_in_pieces(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of tokenizer: its model and what it does unless the file says otherwise.

    spelling: the bytes that the text of an ordinary token stands for.
    leading_space: encoding puts a space before the text, so decoding takes one away.
    """

    model: SubwordModel
    spelling: Callable[[str], bytes]
    add_bos: bool = False
    add_eos: bool = False
    leading_space: bool = False


class Tokenizer:
    """The tokenizer of one model. Safe to share between threads.

    n_vocab: number of tokens; ids are 0 to n_vocab - 1.
    bos_id, eos_id: begin and end of sequence, None where the vocabulary has none.
    eog_ids: every token that ends a completion (end of sequence, of turn, of message ...).
    """

    def __init__(self, vocabulary: Vocabulary, kind: _Kind, metadata: Mapping[str, Any]) -> None:
        special = vocabulary.special
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id = special.bos
        self.eos_id = special.eos
        self.eog_ids = vocabulary.eog_ids
        self._vocabulary = vocabulary
        self._kind = kind
        self._bytes: dict[int, bytes] = {}
        last = special.separator if vocabulary.model == "bert" else special.eos
        self._head = _wanted(special.bos, _flag(metadata, "add_bos_token", kind.add_bos))
        self._tail = _wanted(last, _flag(metadata, "add_eos_token", kind.add_eos))
        self._special_ids = frozenset(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
        user_defined = vocabulary.of_type(TokenType.USER_DEFINED)
        lstrip, rstrip = _stripping(vocabulary, metadata)
        self._user_defined = _SpecialTokens(vocabulary, user_defined, user_defined, lstrip, rstrip)
        self._all_special = _SpecialTokens(
            vocabulary, [*user_defined, *self._special_ids], user_defined, lstrip, rstrip
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file's metadata describes.

        Raises:
            TokenizerError: the file has no tokenizer, one of an unknown kind, or a broken one.
        """
        vocabulary = Vocabulary.from_metadata(metadata)
        build = _BUILDERS.get(vocabulary.model)
        if build is None:
            raise TokenizerError(
                f"tokenizer model {vocabulary.model!r} is not supported; supported are {', '.join(_BUILDERS)}"
            )
        return cls(vocabulary, build(vocabulary, metadata), metadata)

    def encode(
        self, text: str, *, add_special: bool = True, add_end: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        add_special: put the model's begin token before it, where it has one; a begin token that the text
            itself starts with is not doubled.
        add_end: put the model's end token behind it too, where it wants one: for texts that are complete, not
            for prompts, which the model is to go on with.
        parse_special: take control tokens spelled in the text (`<|im_end|>`) as such; of `MarkedText`, only
            those of which the template wrote every character. Tokens that the vocabulary calls user-defined
            are always found.

        A lone surrogate counts as U+FFFD.
        """
        ids: list[int] = []
        plain = _well_formed(unmarked(text))
        marks = marks_of(text) if isinstance(text, MarkedText) else None
        if marks is not None and len(marks) != len(plain):
            marks = bytes(len(plain))  # surrogates were replaced, so it is uncertain what the marks are for
        special_tokens = self._all_special if parse_special else self._user_defined
        for part in special_tokens.split(plain, marks):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._kind.model.encode(part)
        if not add_special:
            return ids
        return [*(self._head if ids[:1] != self._head else ()), *ids, *(self._tail if add_end else ())]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text that `ids` spell; bytes that are no UTF-8 become U+FFFD.

        skip_special: leave out control and unknown tokens.
        continuation: the ids follow others, so that a leading space belongs to the text.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        spelled = (self.token_bytes(id_) for id_ in ids if not (skip_special and self.is_special(id_)))
        text = b"".join(spelled).decode(errors="replace")
        return text[1:] if self._kind.leading_space and not continuation and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token contributes to text; of a special token, its name.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        spelled = self._bytes.get(token_id)
        if spelled is None:
            spelled = self._bytes[token_id] = self._spell(self._checked(token_id))
        return spelled

    def _spell(self, token_id: int) -> bytes:
        token = self._vocabulary.tokens[token_id]
        match self._vocabulary.types[token_id]:
            case TokenType.CONTROL | TokenType.UNKNOWN | TokenType.USER_DEFINED:
                return token.encode()
            case TokenType.BYTE if byte := _BYTE_TOKEN.fullmatch(token):
                return bytes.fromhex(byte[1])
            case _:
                return self._kind.spelling(token)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control or unknown token, which is no part of the text.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        return self._checked(token_id) in self._special_ids

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise ValueError(f"token id {token_id} is not in the vocabulary of {self.n_vocab} tokens")
        return token_id


class _SpecialTokens:
    """Finds special tokens spelled in text: the leftmost, and of those that begin there the longest.

    anywhere: ids that are found whoever wrote the text; others only in what is the template's.
    lstrip, rstrip: ids that swallow the white space before or after them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        ids: Iterable[int],
        anywhere: Iterable[int],
        lstrip: set[int],
        rstrip: set[int],
    ) -> None:
        self._ids = {vocabulary.tokens[id_]: id_ for id_ in ids if vocabulary.tokens[id_]}
        self._anywhere = frozenset(anywhere)
        self._lstrip = lstrip
        self._rstrip = rstrip
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(of_first, reverse=True) for first, of_first in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(lengths))}]") if lengths else None

    def split(self, text: str, marks: bytes | None = None) -> Iterator[str | int]:
        """Plain text and token ids, in order; no empty text.

        marks: a byte for each character, 1 where the template wrote it; None if all of it counts as such.
        """
        start = 0
        for begin, end, id_ in self._find(text, marks):
            if begin < start:
                continue
            plain = text[start:begin]
            if id_ in self._lstrip:
                plain = plain.rstrip(" \t\n\v\f\r")
            if plain:
                yield plain
            yield id_
            start = end
            if id_ in self._rstrip and (spaces := _ASCII_SPACES.match(text, end)):
                start = spaces.end()
        if start < len(text):
            yield text[start:]

    def _find(self, text: str, marks: bytes | None) -> Iterator[tuple[int, int, int]]:
        """Begin, end and id of the longest token at each place; they may overlap."""
        for candidate in self._first.finditer(text) if self._first else ():
            begin = candidate.start()
            for length in self._lengths[candidate[0]]:
                end = begin + length
                id_ = self._ids.get(text[begin:end])
                if id_ is not None and (marks is None or id_ in self._anywhere or 0 not in marks[begin:end]):
                    yield begin, end, id_
                    break


def _stripping(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> tuple[set[int], set[int]]:
    """Ids that strip white space to their left and right.

    The format has no place for this; like llama.cpp (src/llama-vocab.cpp) it is known by the model's name.
    """
    pre = str(metadata.get("tokenizer.ggml.pre", ""))
    architecture = str(metadata.get("general.architecture", ""))
    name = str(metadata.get("general.name", "")).lower()

    def called(*texts: str) -> set[int]:
        return {id_ for id_, token in enumerate(vocabulary.tokens) if token in texts}

    if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code") or architecture in (
        "nomic-bert-moe",
        "jina-bert-v3",
    ):
        return called("<mask>"), set()
    if "phi-3" in name or "phi3" in name:
        special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        return set(), set(special) - called("<unk>", "<s>", "<|endoftext|>")
    if "modern-bert" in name:
        return called("[MASK]"), set()
    return set(), set()


def _wanted(id_: int | None, wanted: bool) -> list[int]:
    return [id_] if wanted and id_ is not None else []


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} must be true or false, found {value!r}")
    return value


def _build_sentencepiece_bpe(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> _Kind:
    space = _flag(metadata, "add_space_prefix", True)
    model = SentencePieceBpeModel(vocabulary, add_space_prefix=space)
    return _Kind(model, _spelled_in_pieces, add_bos=True, leading_space=space)


def _build_bpe(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> _Kind:
    pre = _pre_tokenizer("gemma4" if vocabulary.model == "gemma4" else metadata.get("tokenizer.ggml.pre"))
    lines = read_strings(metadata, "tokenizer.ggml.merges")
    if not lines:
        raise TokenizerError(
            f"tokenizer model {vocabulary.model!r} needs tokenizer.ggml.merges, which the file lacks"
        )
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    lowercase = pre.drop_spaces and _flag(metadata, "normalizer.lowercase", False)
    spelling = _spelled_in_bytes if pre.byte_level else _spelled_in_pieces
    return _Kind(BpeModel(vocabulary, merges, pre, lowercase), spelling, add_bos=pre.add_bos)


def _pre_tokenizer(name: object) -> PreTokenizer:
    if name is None or (isinstance(name, str) and not name):
        logger.warning(
            "the file names no pre-tokenizer (tokenizer.ggml.pre); using 'default', which may be wrong"
        )
        name = "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(f"pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; known are {known}")
    return PRE_TOKENIZERS[name]


def _build_wordpiece(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> _Kind:
    lowercase = _flag(metadata, "normalizer.lowercase", True)
    strip_accents = _flag(metadata, "normalizer.strip_accents", lowercase)
    model = WordPieceModel(vocabulary, lowercase, strip_accents)
    return _Kind(model, _spelled_in_pieces, add_bos=True, add_eos=True, leading_space=True)


def _build_unigram(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> _Kind:
    space = _flag(metadata, "add_space_prefix", False)
    merge_spaces = _flag(metadata, "remove_extra_whitespaces", False)
    key = "tokenizer.ggml.precompiled_charsmap"
    charsmap = np.asarray(metadata.get(key, ()))
    if charsmap.size and charsmap.dtype.kind not in "iu":
        raise TokenizerError(f"{key} must be an array of bytes")
    model = UnigramModel(vocabulary, charsmap.astype(np.uint8).tobytes(), space, merge_spaces)
    return _Kind(model, _spelled_in_pieces, add_eos=True, leading_space=space or merge_spaces)


def _build_rwkv(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> _Kind:
    return _Kind(RwkvModel(vocabulary), unescape_rwkv)


_BUILDERS: dict[str, Callable[[Vocabulary, Mapping[str, Any]], _Kind]] = {
    "llama": _build_sentencepiece_bpe,
    "gpt2": _build_bpe,
    "gemma4": _build_bpe,
    "whitespace": _build_bpe,
    "bert": _build_wordpiece,
    "t5": _build_unigram,
    "rwkv": _build_rwkv,
}
