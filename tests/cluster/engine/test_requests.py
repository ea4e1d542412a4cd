"""What people pass in: sampling parameters, prompts, and settings that decide what is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from redshard.cluster.client.prompts import PromptEncoder, as_list, params_of_each
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ModelError, ParameterError, PromptError, RedshardError
from redshard.cluster.pipeline.plan import (
    PipelineSettings,
    plan_with_cache,
    stage_parts,
    step_limits,
)
from redshard.loader.shard_plan import DEFAULT_OVERHEAD_BYTES as OVERHEAD
from redshard.loader.shard_plan import DeviceBudget, ModelSize
from redshard.loader.tokenizer.chat_template import ChatTemplate, ChatTemplateError
from redshard.loader.tokenizer.marked_text import MarkedText, marks_of
from redshard.worker.configuration import WorkerConfiguration


def test_defaults_are_those_of_llama_cpp() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert not params.penalizes
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=None).stop == ()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature'"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "finite"),
        ({"temperature": 1e308}, "temperature=1e"),
        ({"top_p": float("nan")}, "finite"),
        ({"repeat_penalty": 1e-300}, "repeat_penalty=1e-300"),
        ({"max_tokens": True}, "max_tokens=True: .*whole number"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed"),
        ({"repeat_penalty": 0}, "repeat_penalty=0"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"logit_bias": {5: 101}}, "logit_bias"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"stop": ["x"] * 100_000}, "stop=.*at most 256"),
        ({"stop": ["x" * 1025]}, "stop.0=.*at most 1024"),
        ({"stop_token_ids": list(range(100_000))}, "stop_token_ids=.*at most 1024"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias=.*at most 300"),
        ({"x" * 100_000: 1}, "unknown sampling parameter"),
    ],
)
def test_bad_parameters_are_named(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ParameterError, match=reason) as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    with pytest.raises(ParameterError):
        SamplingParams().model_copy(update=values)
    assert isinstance(caught.value, (RedshardError, ValueError))


def test_a_copy_keeps_what_is_not_updated() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2], logit_bias={3: 1.0}, seed=4)
    assert params.model_copy() == params
    assert params.model_copy(update={"seed": 5}) == SamplingParams(**{**dict(params), "seed": 5})


def test_a_temperature_near_zero_is_greedy() -> None:
    assert SamplingParams(temperature=1e-300).temperature == 0
    assert SamplingParams(temperature=0.001).temperature == 0.001


class Letters:
    """One token a letter, and token 1 for what looks like a special token."""

    n_vocab = 128

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        marks = marks_of(text) if isinstance(text, MarkedText) else b"\1" * len(text)
        is_special = [
            parse_special and letter == "<" and mark for letter, mark in zip(text, marks, strict=True)
        ]
        return [1 if special else ord(letter) for letter, special in zip(text, is_special, strict=True)]


TEMPLATE = ChatTemplate(
    {"default": "{% for m in messages %}<{{ m.role[0] }}:{{ m.content }};{% endfor %}"}, {}
)


def test_prompts_of_every_kind() -> None:
    encoder = PromptEncoder(Letters(), TEMPLATE, 20)
    assert encoder.encode("ab") == [97, 98]
    assert encoder.encode([1, 2]) == [1, 2]
    assert encoder.encode(np.array([1, 2], np.int32)) == [1, 2]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert encoder.encode(chat) == [1, *map(ord, "u:hi;"), 1, *map(ord, "a:yo;")]
    forging = [{"role": "user", "content": "<hi"}]
    assert encoder.encode(forging) == [1, *map(ord, "u:<hi;")]
    trusting = PromptEncoder(Letters(), TEMPLATE, 20, parse_special=True)
    assert trusting.encode(forging) == [1, *map(ord, "u:"), 1, *map(ord, "hi;")]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty"),
        ([], "empty"),
        ("a" * 21, "21 tokens.*larger max_context"),
        ([128], "token 128"),
        ([-1], "token -1"),
        (["a", "b"], "not"),
        (5, "not 5"),
        (b"ab", "not b'ab'"),
        ([1.5], "not"),
        ([{"content": "x"}], "role"),
    ],
)
def test_unusable_prompts(prompt: Any, reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        PromptEncoder(Letters(), TEMPLATE, 20).encode(prompt)


def test_messages_for_a_model_without_template() -> None:
    encoder = PromptEncoder(Letters(), ChatTemplateError("the file has no chat template"), 20)
    with pytest.raises(PromptError, match="no chat template"):
        encoder.encode([{"role": "user", "content": "hi"}])


def test_one_prompt_or_many() -> None:
    message = {"role": "user", "content": "hi"}
    assert as_list("ab") == ["ab"]
    assert as_list([1, 2]) == [[1, 2]]
    assert as_list(np.array([1, 2])) == [[1, 2]]
    assert as_list([message]) == [[message]]
    assert as_list(["a", "b"]) == ["a", "b"]
    assert as_list([[1], "b", [message]]) == [[1], "b", [message]]
    assert as_list([]) == []
    assert as_list(b"ab") == [b"ab"]
    greedy, warm = SamplingParams(temperature=0), SamplingParams(temperature=1)
    assert params_of_each(None, 2) == [SamplingParams()] * 2
    assert params_of_each([greedy, warm], 2) == [greedy, warm]
    with pytest.raises(ParameterError, match="each of the 3"):
        params_of_each([greedy, warm], 3)


SIZE = ModelSize(layers=(1 << 30,) * 8, input=1 << 28, output=1 << 28, shared=0, kv_per_token=(4096,) * 8)
SETTINGS = PipelineSettings(
    path="model.gguf",
    n_stages=2,
    kind="cpu",
    max_context=4096,
    max_sequences=16,
    max_step_tokens=256,
    cache_tokens=None,
    handoff="float32",
    worker=WorkerConfiguration(),
)


def test_the_cache_holds_every_sequence_or_what_fits() -> None:
    plan, tokens = plan_with_cache(SIZE, [DeviceBudget(64 << 30)] * 2, SETTINGS, lambda tokens: OVERHEAD)
    assert tokens == 4096 * 16
    parts = stage_parts(plan)
    assert [(part.is_first, part.is_last) for part in parts] == [(True, False), (False, True)]
    assert [*parts[0].layers, *parts[1].layers] == list(range(8))

    plan, tokens = plan_with_cache(SIZE, [DeviceBudget(11 << 29)] * 2, SETTINGS, lambda tokens: OVERHEAD)
    assert 4096 <= tokens < 4096 * 16
    assert all(stage.free_bytes >= 0 for stage in plan.stages)
    limits = step_limits(SETTINGS, tokens)
    assert limits.n_kv_blocks * limits.block_size == tokens


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(ModelError, match="GiB"):
        plan_with_cache(SIZE, [DeviceBudget(2 << 30)] * 2, SETTINGS, lambda tokens: OVERHEAD)
    with pytest.raises(ModelError, match="would fit"):
        plan_with_cache(
            SIZE, [DeviceBudget(11 << 29)] * 2, replace(SETTINGS, cache_tokens=10**9), lambda n: OVERHEAD
        )
