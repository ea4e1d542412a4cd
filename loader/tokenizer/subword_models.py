"""The models that turn a fragment of plain text into token ids, one for each `tokenizer.ggml.model`.

Byte-pair encoding and WordPiece are those of Hugging Face `tokenizers`. The others are written out here
because their results depend on rules that library does not have: SentencePiece's choice among equal scores,
its longest-match normalization, and RWKV's greedy bytes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from redshard.loader.tokenizer.charsmap import Charsmap
from redshard.loader.tokenizer.pre_tokenizers import PreTokenizer
from redshard.loader.tokenizer.vocabulary import TokenizerError, TokenType, Vocabulary

SPACE = "\u2581"
"""How SentencePiece spells the space inside a token."""

_CACHED_WORDS = 1 << 15
_LONGEST_CACHED_WORD = 64


class SubwordModel(Protocol):
    """Encodes text that holds no special tokens."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which must have no lone surrogates."""
        ...


def byte_alphabet() -> list[str]:
    """The character that spells each byte in byte-level BPE: itself if printable, else one from U+0100 on.

    Source: `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


class BpeModel:
    """Byte-pair encoding by a ranked list of merges."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        merges: list[tuple[str, str]],
        pre_tokenizer: PreTokenizer,
        lowercase: bool,
    ) -> None:
        ids = vocabulary.ids()
        # The library refuses merges whose parts or result are no tokens; they cannot yield ids anyway. The
        # first of equal merges counts.
        usable = {
            (left, right): None
            for left, right in merges
            if left in ids and right in ids and left + right in ids
        }
        self._tokenizer = Tokenizer(
            models.BPE(
                ids,
                list(usable),
                byte_fallback=not pre_tokenizer.byte_level,
                ignore_merges=pre_tokenizer.ignore_merges,
            )
        )
        behavior = "removed" if pre_tokenizer.drop_spaces else "isolated"
        stages: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior) for pattern in pre_tokenizer.patterns
        ]
        if pre_tokenizer.byte_level:
            stages.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        elif not pre_tokenizer.drop_spaces:
            self._tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        elif lowercase:
            self._tokenizer.normalizer = normalizers.Lowercase()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class WordPieceModel:
    """BERT's WordPiece: in each word, the longest token from the left.

    In the file a token that begins a word starts with U+2581 and one that continues a word is bare; the
    library, like BERT's own files, marks the continuing ones with `##`.
    """

    def __init__(self, vocabulary: Vocabulary, lowercase: bool, strip_accents: bool) -> None:
        unknown = vocabulary.special.unknown
        if unknown is None:
            raise TokenizerError(
                "a WordPiece vocabulary needs an unknown token (tokenizer.ggml.unknown_token_id)"
            )
        special = set(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN))
        ids: dict[str, int] = {}
        for id_, token in enumerate(vocabulary.tokens):
            if id_ in special:
                ids[token] = id_
            else:
                ids[token[1:] if token.startswith(SPACE) else "##" + token] = id_
        unknown_token = vocabulary.tokens[unknown]
        ids[unknown_token] = unknown
        self._tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown_token))
        self._tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=strip_accents, lowercase=lowercase
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class _Adjacency:
    """Cuts text where no token can reach across, which leaves every result of the models below unchanged."""

    def __init__(self, tokens: list[str]) -> None:
        self._pairs: set[str] = set()
        for token in tokens:
            self._pairs.update(map(str.__add__, token, token[1:]))

    def cut(self, text: str) -> Iterator[str]:
        pairs = self._pairs
        start = 0
        for end, pair in enumerate(map(str.__add__, text, text[1:]), 1):
            if pair not in pairs:
                yield text[start:end]
                start = end
        yield text[start:]


class SentencePieceBpeModel:
    """SentencePiece BPE: of all adjacent symbols that form a token, join the pair with the highest score,
    leftmost first, until none is left. What is no token then is spelled in bytes.

    Takes O(n log n) for n characters without a boundary, O(1) for a short word seen before.
    """

    def __init__(self, vocabulary: Vocabulary, add_space_prefix: bool) -> None:
        self._ids = vocabulary.ids()
        scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
        self._costs = {token: -scores[id_] for token, id_ in self._ids.items()}
        self._prefix = SPACE if add_space_prefix else ""
        self._unknown = vocabulary.special.unknown
        self._adjacency = _Adjacency(vocabulary.tokens)
        self._cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._adjacency.cut(self._prefix + text.replace(" ", SPACE)):
            ids += self._cached(word) if len(word) <= _LONGEST_CACHED_WORD else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        ids: list[int] = []
        for symbol in self._merge(word):
            id_ = self._ids.get(symbol)
            ids += self._bytes(symbol) if id_ is None else (id_,)
        return ids

    def _bytes(self, symbol: str) -> list[int]:
        ids = [self._ids.get(f"<0x{byte:02X}>", self._unknown) for byte in symbol.encode()]
        return [id_ for id_ in ids if id_ is not None]

    def _merge(self, word: str) -> list[str]:
        symbols = list(word)
        before = list(range(-1, len(word) - 1))
        after = [*range(1, len(word)), -1]
        costs = self._costs
        heap = [
            (cost, left, left + 1, 2)
            for left, pair in enumerate(map(str.__add__, word, word[1:]))
            if (cost := costs.get(pair)) is not None
        ]
        heapq.heapify(heap)

        def propose(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = symbols[left] + symbols[right]
                cost = costs.get(joined)
                if cost is not None:
                    heapq.heappush(heap, (cost, left, right, len(joined)))

        while heap:
            _, left, right, length = heapq.heappop(heap)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of the two has changed since
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            propose(before[left], left)
            propose(left, after[left])
        return [symbol for symbol in symbols if symbol]


class UnigramModel:
    """SentencePiece Unigram: of all segmentations of the normalized text, the one with the highest score."""

    _UNKNOWN_PENALTY = 10.0

    def __init__(
        self, vocabulary: Vocabulary, charsmap: bytes, add_space_prefix: bool, merge_spaces: bool
    ) -> None:
        self._normalize = Charsmap(charsmap).apply
        self._add_space_prefix = add_space_prefix
        self._merge_spaces = merge_spaces
        unknown = vocabulary.special.unknown
        if unknown is None:
            raise TokenizerError(
                "a Unigram vocabulary needs an unknown token (tokenizer.ggml.unknown_token_id)"
            )
        plain = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
        scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
        self._pieces = {vocabulary.tokens[id_]: (id_, scores[id_]) for id_ in plain}
        self._unknown = unknown
        self._unknown_score = min((scores[id_] for id_ in vocabulary.of_type(TokenType.NORMAL)), default=0.0)
        self._unknown_score -= self._UNKNOWN_PENALTY
        self._longest: dict[str, int] = {}  # of the pieces that begin with two characters
        for piece in self._pieces:
            self._longest[piece[:2]] = max(len(piece), self._longest.get(piece[:2], 1))
        self._adjacency = _Adjacency(list(self._pieces))
        self._cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._adjacency.cut(self._spaced(self._normalize(text))):
            ids += self._cached(word) if len(word) <= _LONGEST_CACHED_WORD else self._encode_word(word)
        # Unknown characters in a row are one unknown token.
        return [
            id_
            for id_, last in zip(ids, [None, *ids], strict=False)
            if id_ != self._unknown or last != self._unknown
        ]

    def _spaced(self, text: str) -> str:
        if self._merge_spaces:
            return "".join(SPACE + word for word in text.split(" ") if word)
        if self._add_space_prefix and (words := text.lstrip(" ")):
            text = text[: len(text) - len(words)] + " " + words
        return text.replace(" ", SPACE)

    def _encode_word(self, word: str) -> list[int]:
        """Viterbi over the characters: best score of a segmentation up to each, and its last token."""
        if not word:
            return []
        best = [0.0] + [-float("inf")] * len(word)
        last: list[tuple[int, int]] = [(self._unknown, 0)] * (len(word) + 1)
        for start in range(len(word)):
            base = best[start]
            if word[start] not in self._pieces and base + self._unknown_score > best[start + 1]:
                best[start + 1], last[start + 1] = base + self._unknown_score, (self._unknown, start)
            longest = self._longest.get(word[start : start + 2], 1)
            for end in range(start + 1, min(start + longest, len(word)) + 1):
                piece = self._pieces.get(word[start:end])
                if piece is not None and base + piece[1] > best[end]:
                    best[end], last[end] = base + piece[1], (piece[0], start)
        ids: list[int] = []
        end = len(word)
        while end:
            id_, end = last[end]
            ids.append(id_)
        return ids[::-1]


def unescape_rwkv(token: str) -> bytes:
    """Bytes of a token of the RWKV world vocabulary, which is written with backslash escapes."""
    return re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", _unescaped, token.encode(), flags=re.DOTALL)


def _unescaped(escape: re.Match[bytes]) -> bytes:
    body = escape[1]
    if len(body) == 3:
        return bytes.fromhex(body[1:].decode())
    return {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(body, body)


class RwkvModel:
    """RWKV world: the longest token from the left, over bytes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = {unescape_rwkv(token): id_ for id_, token in enumerate(vocabulary.tokens)}
        self._unknown = vocabulary.special.unknown
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(of_start, reverse=True) for start, of_start in lengths.items()}

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        ids: list[int] = []
        position = 0
        while position < len(data):
            id_, length = self._longest(data, position)
            position += length
            if id_ is not None:
                ids.append(id_)
        return ids

    def _longest(self, data: bytes, position: int) -> tuple[int | None, int]:
        for start in (data[position : position + 2], data[position : position + 1]):
            for length in self._lengths.get(start, ()):
                id_ = self._ids.get(data[position : position + length])
                if id_ is not None:
                    return id_, length
        return self._unknown, 1
