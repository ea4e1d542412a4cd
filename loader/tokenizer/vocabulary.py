"""A vocabulary as a GGUF file states it: tokens, their kinds and scores, and the tokens with a role.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (tokenizer.ggml.*).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

logger = logging.getLogger(__name__)

END_OF_GENERATION_TEXTS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
"""Tokens that end a completion whatever role the file gives them (list: llama.cpp, src/llama-vocab.cpp)."""

_INFILL_END_TEXTS = frozenset(
    [
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<fim-repo>",
        "<REPO>",
        "<REP>",
        "<reponame>",
        "<|repo_name|>",
        "<|file_sep|>",
    ]
)


class TokenizerError(ValueError):
    """The file's tokenizer is missing, broken or of a kind that is not supported."""


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the tokens with a role; None where the vocabulary has no such token."""

    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None
    separator: int | None = None


_CONVENTIONAL_IDS = {
    "llama": SpecialIds(bos=1, eos=2, unknown=0),
    "bert": SpecialIds(bos=101, unknown=100, separator=102),
    "t5": SpecialIds(eos=1, unknown=2),
}
"""What files of these kinds mean when they name no ids."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens of one file, by id.

    model: `tokenizer.ggml.model`.
    tokens: texts, in the model's own spelling.
    types: a `TokenType` value each (other values count as NORMAL).
    scores: merge or unigram scores; empty when the file has none.
    special: ids with a role.
    eog_ids: tokens that end a completion.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    special: SpecialIds
    eog_ids: frozenset[int]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read the vocabulary of a GGUF file's metadata.

        Raises:
            TokenizerError: the file has no vocabulary, or its arrays do not fit together.
        """
        model = metadata.get("tokenizer.ggml.model")
        if not isinstance(model, str) or model in ("none", "no_vocab"):
            raise TokenizerError(
                "the file has no tokenizer (tokenizer.ggml.model); use a file with a vocabulary"
            )
        tokens = read_strings(metadata, "tokenizer.ggml.tokens")
        if not tokens:
            raise TokenizerError("the file's vocabulary (tokenizer.ggml.tokens) is missing or empty")
        types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens)) or [int(TokenType.NORMAL)] * len(
            tokens
        )
        special = _special_ids(metadata, model, len(tokens))
        eog_ids = _end_of_generation(metadata, tokens, types, special.eos)
        for id_ in eog_ids:
            if types[id_] == TokenType.NORMAL or types[id_] == TokenType.USER_DEFINED:
                types[id_] = int(TokenType.CONTROL)
        scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
        return cls(model, tokens, types, scores, special, eog_ids)

    def ids(self) -> dict[str, int]:
        """Token text to id; of equal texts the last."""
        return {token: id_ for id_, token in enumerate(self.tokens)}

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of any of these types."""
        return [id_ for id_, type_ in enumerate(self.types) if type_ in types]


def _array(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key, ())
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TokenizerError(f"{key} must be an array, found {value!r}")
    return list(value)


def read_strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """The array of strings under `key`; empty where there is none.

    Raises:
        TokenizerError: the value is something else.
    """
    values = _array(metadata, key)
    if not set(map(type, values)) <= {str}:
        raise TokenizerError(f"{key} must be an array of strings")
    return values


def _numbers(metadata: Mapping[str, Any], key: str, length: int) -> list[Any]:
    values = _array(metadata, key)
    if values and len(values) < length:
        raise TokenizerError(f"{key} has {len(values)} entries for {length} tokens")
    if not set(map(type, values)) <= {int, float}:
        raise TokenizerError(f"{key} must be an array of numbers")
    return values[:length]


def _special_ids(metadata: Mapping[str, Any], model: str, n_vocab: int) -> SpecialIds:
    conventional = _CONVENTIONAL_IDS.get(model, SpecialIds())

    def stated(name: str, otherwise: int | None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        id_ = metadata.get(key, otherwise)
        if id_ is None or (isinstance(id_, int) and 0 <= id_ < n_vocab):
            return id_
        logger.warning("%s is %r, which is not one of the %d tokens; ignored", key, id_, n_vocab)
        return otherwise if otherwise is not None and otherwise < n_vocab else None

    return SpecialIds(
        bos=stated("bos", stated("cls", conventional.bos)),
        eos=stated("eos", conventional.eos),
        unknown=stated("unknown", conventional.unknown),
        separator=stated("seperator", conventional.separator),  # so spelled in the format
    )


def _end_of_generation(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], eos: int | None
) -> frozenset[int]:
    stated = [eos, *(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    ids = {id_ for id_ in stated if isinstance(id_, int) and 0 <= id_ < len(tokens)}
    known = END_OF_GENERATION_TEXTS | _INFILL_END_TEXTS
    # Some vocabularies have an ordinary token for the HTML tag </s>.
    by_text = {
        token: id_
        for id_, token in enumerate(tokens)
        if token in known and not (token == "</s>" and types[id_] == TokenType.NORMAL)
    }
    ids.update(by_text.values())
    # Where these formats have their own last token, an older one of the list only separates messages or is
    # plain text.
    if any(pair <= by_text.keys() for pair in ({"<|call|>", "<|return|>"}, {"<|calls|>", "<|flush|>"})):
        ids.discard(by_text.get("<|end|>", -1))
    if "<|tool_response>" in by_text:
        ids.discard(by_text.get("</s>", -1))
    return frozenset(ids)
