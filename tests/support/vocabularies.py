"""Small vocabularies as GGUF metadata, and plain references for what their tokenizers must do."""

from __future__ import annotations

import itertools
from typing import Any

from redshard.loader.tokenizer.subword_models import byte_alphabet
from redshard.loader.tokenizer.vocabulary import TokenType

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (int(kind) for kind in TokenType)
ALPHABET = byte_alphabet()


def metadata(model: str, tokens: list[tuple[str, int, float]], **keys: Any) -> dict[str, Any]:
    """GGUF metadata of a vocabulary of (text, type, score); `keys` are tokenizer.ggml keys."""
    stated = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": [text for text, _, _ in tokens],
        "tokenizer.ggml.token_type": [type_ for _, type_, _ in tokens],
        "tokenizer.ggml.scores": [score for _, _, score in tokens],
        **stated,
    }


def sentencepiece_bpe(pieces: list[str], *, controls: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    """<unk> <s> </s>, the byte tokens, `controls`, then `pieces` from the highest score down."""
    head = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
    bytes_ = [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
    named = [(text, CONTROL, 0.0) for text in controls]
    ranked = [(piece, NORMAL, float(-rank)) for rank, piece in enumerate(pieces)]
    return metadata("llama", [*head, *bytes_, *named, *ranked], **keys)


def byte_level_bpe(
    merges: list[tuple[str, str]], *, special: tuple[tuple[str, int], ...] = (), **keys: Any
) -> dict[str, Any]:
    """The 256 byte characters, the results of `merges` (in that alphabet), then `special` (text, type)."""
    texts = dict.fromkeys([*ALPHABET, *(left + right for left, right in merges)])
    tokens = [(text, NORMAL, 0.0) for text in texts] + [(text, type_, 0.0) for text, type_ in special]
    lines = [f"{left} {right}" for left, right in merges]
    return metadata("gpt2", tokens, merges=lines, **keys)


def id_of(metadata: dict[str, Any], text: str) -> int:
    """The id of a token."""
    return metadata["tokenizer.ggml.tokens"].index(text)


def texts_of(metadata: dict[str, Any], ids: list[int]) -> list[str]:
    """The tokens behind ids."""
    return [metadata["tokenizer.ggml.tokens"][id_] for id_ in ids]


def merged_by_rank(symbols: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding by its definition: join the best-ranked pair, leftmost first, until none is left."""
    rank = {pair: place for place, pair in reversed(list(enumerate(merges)))}
    while True:
        known = [(rank[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in rank]
        if not known:
            return symbols
        _, at = min(known)
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


def merged_by_score(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """SentencePiece BPE by its definition: join the pair whose text scores highest, leftmost first."""
    while True:
        pairs = [left + right for left, right in itertools.pairwise(symbols)]
        known = [(-scores[pair], at) for at, pair in enumerate(pairs) if pair in scores]
        if not known:
            return symbols
        _, at = min(known)
        symbols = [*symbols[:at], pairs[at], *symbols[at + 2 :]]
