"""How the tokens of a completion are chosen and when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from redshard.cluster.errors import ParameterError
from redshard.worker.device.arguments import MAX_TOP_LOGPROBS

_LEAST_TEMPERATURE = 1e-4

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SamplingParams(BaseModel):
    """Sampling parameters of one request; immutable and validated.

    The defaults are llama.cpp's: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, no penalties.
    ``temperature=0`` is greedy: the largest logit, the lowest id among equals. The order is bias and
    penalties, top-k, top-p, min-p (on the probabilities), temperature, one draw.

    Attributes:
        max_tokens: tokens to generate at most; generation also ends where the context is full.
        temperature: divides the logits; 0 is greedy, as is anything below 0.0001.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep tokens at least this times as probable as the most probable one; 0 keeps all.
        seed: the same seed gives the same tokens whatever else is in the batch; None draws a fresh one.
        repeat_penalty: divides positive and multiplies negative logits of the tokens in prompt and output;
            1 is none.
        presence_penalty: subtracted once from the logit of every token in the output.
        frequency_penalty: subtracted from a token's logit for every time it is in the output.
        logit_bias: token id -> what is added to its logit: at most 100 either way, for at most 300 tokens, as
            in the OpenAI API.
        stop: strings that end the completion; the text ends before them. At most 256, of at most 1,024
            characters. They may name special tokens, which are not part of the text otherwise.
        stop_token_ids: tokens that end the completion, besides the model's own end-of-generation tokens; at
            most 1,024.
        ignore_eos: go on past the model's end-of-generation tokens.
        logprobs: None for none; else log probabilities of each token and of this many most probable ones.

    Raises:
        ParameterError: for an unknown name or a value out of range, naming both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.8, ge=0, le=1000)
    top_k: int = Field(40, ge=0, lt=2**31)
    top_p: float = Field(0.95, gt=0, le=1)
    min_p: float = Field(0.05, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    repeat_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=300)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field((), max_length=256)
    stop_token_ids: frozenset[TokenId] = Field(frozenset(), max_length=1024)
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ParameterError(_sentence(error)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> SamplingParams:
        """As pydantic's, but what is updated is validated as well."""
        return SamplingParams(**{**dict(self), **(update or {})})

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        """Accept a single string, and None for none."""
        if stop is None:
            return ()
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("max_tokens", "top_k", "seed", "logprobs", mode="before")
    @classmethod
    def _no_truth_value(cls, number: Any) -> Any:
        if isinstance(number, bool):
            raise ValueError("must be a whole number")
        return number

    @field_validator("temperature")
    @classmethod
    def _greedy_where_nearly(cls, temperature: float) -> float:
        """The largest logit wins at such temperatures, but dividing by them could overflow."""
        return temperature if temperature >= _LEAST_TEMPERATURE else 0.0

    @property
    def penalizes(self) -> bool:
        """Whether sampling depends on the tokens before."""
        return self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _sentence(error: ValidationError) -> str:
    """The first complaint of a validation, with the value that caused it."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown sampling parameter {name!r:.80}; known are {', '.join(SamplingParams.model_fields)}"
    return f"sampling parameter {name}={first['input']!r:.80}: {first['msg'][:1].lower()}{first['msg'][1:]}"
