"""The whole house: `LLM` on real Ray and the CPU device, on one, two and three stages."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.gguf_models import tiny_config, write_model
from support.stages import CachedSequence, Pipeline, relative_error

from redshard.cluster.client.llm import LLM
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ModelError, ParameterError, PipelineError, PromptError, RequestError
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.tokenizer.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "data" / "conformance" / "qwen3.q8_0.gguf"
PROMPTS = [f"{word} " * (3 * i + 1) for i, word in enumerate(["the", "rain", "in", "an", "ring", "and"])]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
CONTEXT = 128


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda n: f"{n}-stages")
def llm(ray_instance: None, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Two layers and an output on one, two and three stages, one after the other."""
    with LLM(MODEL, stages=request.param, device="cpu", max_context=CONTEXT, max_sequences=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Greedy answers to `PROMPTS`, each computed alone in this process, without cluster or scheduler."""
    with GGUFFile.open(MODEL) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    with Pipeline(MODEL) as pipeline:
        return [greedy(pipeline, tokenizer.encode(prompt), 24) for prompt in PROMPTS]


def greedy(pipeline: Pipeline, tokens: list[int], n: int) -> list[int]:
    """The `n` most probable next tokens, one after the other."""
    sequence, answer, step = CachedSequence(), [], tokens
    for _ in range(n):
        (logits,) = pipeline.logits((sequence, step))
        answer.append(int(np.argmax(logits[-1])))
        step = answer[-1:]
    return answer


def test_greedy_answers_are_those_of_each_prompt_alone(llm: LLM, expected: list[list[int]]) -> None:
    completions = llm.generate(PROMPTS, GREEDY)
    assert [completion.token_ids for completion in completions] == expected
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.prompt_token_ids == llm.tokenizer.encode(prompt)
        assert completion.text == llm.tokenizer.decode(completion.token_ids, continuation=True)
        assert completion.finish_reason == "length"
        assert completion.usage.prompt_tokens == len(completion.prompt_token_ids)
        assert completion.usage.completion_tokens == 24
    (alone,) = llm.generate(PROMPTS[4], GREEDY)
    assert alone.token_ids == expected[4]


def test_a_seed_gives_the_same_tokens_in_any_batch(llm: LLM) -> None:
    params = [SamplingParams(seed=i, max_tokens=16, repeat_penalty=1.3, ignore_eos=True) for i in range(6)]
    together = llm.generate(PROMPTS, params)
    for i in (0, 3, 5):
        (alone,) = llm.generate([PROMPTS[i]], params[i])
        assert alone.token_ids == together[i].token_ids
    fresh = llm.generate([PROMPTS[0]] * 4, SamplingParams(temperature=2, max_tokens=16, ignore_eos=True))
    assert len({tuple(completion.token_ids) for completion in fresh}) > 1


def test_streams_and_asyncio_say_the_same(llm: LLM) -> None:
    completions = llm.generate(PROMPTS, GREEDY)
    texts = [""] * len(PROMPTS)
    for chunk in llm.stream(PROMPTS, GREEDY):
        texts[chunk.index] += chunk.text
    assert texts == [completion.text for completion in completions]

    async def in_asyncio() -> tuple[list[str], str]:
        whole, streamed = await asyncio.gather(llm.agenerate(PROMPTS, GREEDY), stream_last())
        return [completion.text for completion in whole], streamed

    async def stream_last() -> str:
        return "".join([chunk.text async for chunk in llm.astream(PROMPTS[-1], GREEDY)])

    assert asyncio.run(in_asyncio()) == (texts, texts[-1])


def test_stop_strings_and_logprobs(llm: LLM) -> None:
    (whole,) = llm.generate("the", GREEDY.model_copy(update={"logprobs": 3}))
    assert whole.logprobs is not None
    for token, entry in zip(whole.token_ids, whole.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == pytest.approx(entry.top[0][1])
        assert len(entry.top) == 3
    first = llm.logits(whole.prompt_token_ids)[-1]
    probability = np.exp(first - first.max()) / np.exp(first - first.max()).sum()
    assert whole.logprobs[0].logprob == pytest.approx(np.log(probability.max()), abs=1e-4)

    stop = whole.text[5:8]
    (stopped,) = llm.generate("the", GREEDY.model_copy(update={"stop": (stop,)}))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_chat_messages_go_through_the_template(llm: LLM) -> None:
    (completion,) = llm.generate([{"role": "user", "content": "and the"}], GREEDY)
    text = "<|user|>and the<|assistant|>"
    assert completion.prompt_token_ids == llm.tokenizer.encode(text, parse_special=True)


def test_generation_ends_with_the_context(llm: LLM) -> None:
    prompt = [5] * (CONTEXT - 10)
    (completion,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=500, ignore_eos=True))
    assert len(completion.token_ids) == 10
    assert completion.finish_reason == "length"


def test_unusable_prompts_and_parameters_are_refused(llm: LLM) -> None:
    for prompt, reason in (
        ("", "empty"),
        ([5] * CONTEXT, "larger max_context"),
        ([10**6], "not in the vocabulary"),
        ([{"role": "user"}], "message"),
    ):
        with pytest.raises(PromptError, match=reason):
            llm.generate([prompt])
    with pytest.raises(PromptError, match=r"prompt 2 of 3: .*empty"):
        llm.generate(["a", "", "b"])
    with pytest.raises(PromptError, match="empty"):
        llm.stream([""])
    with pytest.raises(PromptError, match="empty"):
        llm.astream([""])
    n_vocab = llm.tokenizer.n_vocab
    with pytest.raises(ParameterError, match=f"logit_bias names token {n_vocab}"):
        llm.generate("a", SamplingParams(logit_bias={n_vocab: 1}))
    with pytest.raises(ParameterError, match=f"stop_token_ids names token {n_vocab}"):
        llm.generate("a", SamplingParams(stop_token_ids=[n_vocab]))
    assert llm.logits([5] * CONTEXT).shape == (CONTEXT, n_vocab)
    with pytest.raises(PromptError, match=f"room for {CONTEXT}; "):
        llm.logits([5] * (CONTEXT + 1))
    with pytest.raises(ParameterError, match="one for each of the 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    assert llm.generate([], GREEDY) == []


def test_a_killed_worker_costs_a_pause(llm: LLM, expected: list[list[int]]) -> None:
    victim = llm.stats()["workers"][-1]["pid"]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for n, chunk in enumerate(llm.stream(PROMPTS, GREEDY)):
        tokens[chunk.index] += chunk.token_ids
        if n == 20:
            os.kill(victim, signal.SIGKILL)
    assert tokens == expected
    assert llm.stats()["times"]["restarts"] == 1


def test_logits_are_those_of_a_worker_in_this_process_and_of_the_conformance_kit(llm: LLM) -> None:
    kit = np.load(MODEL.with_suffix(".npz"))
    logits = llm.logits(kit["tokens"])
    with Pipeline(MODEL) as pipeline:
        np.testing.assert_array_equal(logits, pipeline.logits_in_chunks(kit["tokens"]))
    assert relative_error(logits, kit["logits"]) < 3e-2


def test_workers_show_what_they_hold(llm: LLM) -> None:
    workers, maps = llm.stats()["workers"], llm.memory_map()
    assert len(workers) == len(maps)
    assert workers[0]["first_layer"] == 0
    assert [worker["first_layer"] for worker in workers[1:]] == [
        worker["end_layer"] for worker in workers[:-1]
    ]
    assert workers[-1]["end_layer"] == llm.config.n_layers
    assert all(worker["weight_bytes"] > 0 for worker in workers)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stages", "2"),
        ("stages", True),
        ("max_context", 0),
        ("max_context", 10**6),
        ("max_sequences", 0),
        ("max_sequences", 2.0),
        ("max_step_tokens", 16),
        ("max_step_tokens", 65537),
        ("cache_tokens", 0),
        ("cache_tokens", -1),
        ("handoff_dtype", "bfloat16"),
        ("device", "tpu"),
        ("device", ["cpu"]),
        ("worker", {}),
    ],
)
def test_arguments_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=f"^{name} is "):
        LLM(MODEL, **{name: value})


def test_types_of_weights_without_a_kernel_are_refused_before_anything_starts(tmp_path: Path) -> None:
    content = MODEL.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two of them
    assert content[at] == QuantType.Q8_0.ggml_id
    same_size = content[:at] + bytes([QuantType.IQ4_NL.ggml_id]) + content[at + 1 :]
    model = tmp_path / "types.gguf"
    model.write_bytes(same_size)
    for device in ("auto", "cpu", "hip"):
        with pytest.raises(
            ModelError, match=r"types\.gguf: tensor 'blk.0.attn_q.weight' has type IQ4_NL.*Q4_K"
        ):
            LLM(model, device=device)


def test_models_that_cannot_be_loaded_say_why(ray_instance: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.gguf"):
        LLM(tmp_path / "missing.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(MODEL.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        LLM(broken)
    with pytest.raises(ParameterError, match="stages is 5; here it must be a whole number from 1 to 4"):
        LLM(MODEL, stages=5)
    with pytest.raises(ModelError, match="would fit"):
        LLM(MODEL, device="cpu", cache_tokens=10**12)


def test_a_model_that_was_replaced_is_not_loaded_again(ray_instance: None, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", tiny_config(n_layers=2), seed=1)
    other = write_model(tmp_path / "other.gguf", tiny_config(n_layers=2), seed=2)
    assert model.stat().st_size == other.stat().st_size
    with LLM(model, device="cpu", max_context=64) as llm:
        before = llm.generate([[1, 2, 3]], GREEDY)[0].token_ids
        os.replace(other, model)
        os.kill(llm.stats()["workers"][0]["pid"], signal.SIGKILL)
        with pytest.raises((RequestError, PipelineError), match=r"model\.gguf: has changed since"):
            _ask_until_it_fails(llm, before)


def _ask_until_it_fails(llm: LLM, expected: list[int]) -> None:
    for _ in range(3):  # the death may not have been noticed yet
        assert llm.generate([[1, 2, 3]], GREEDY)[0].token_ids == expected
