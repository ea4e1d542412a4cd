"""``redshard generate``: completions of prompts, streamed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.rule import Rule

from cluster.commands.figures import Stopwatch
from cluster.commands.loading import Loaded, loaded_model
from cluster.commands.options import DeviceName, DeviceOption, JsonOption, ModelArgument, StagesOption
from cluster.commands.text_files import read_lines
from cluster.completion import CompletionChunk
from cluster.errors import ParameterError
from cluster.prompts import Prompt
from cluster.sampling_params import SamplingParams

_DEFAULTS = SamplingParams()


def generate(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read a prompt from each line of this file; - is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages of a user.")] = False,
    stages: StagesOption = 1,
    device: DeviceOption = DeviceName.AUTO,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; up to 4096 unless given.", show_default=False)
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences that run at the same time.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = _DEFAULTS.max_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _DEFAULTS.temperature,
    top_k: Annotated[
        int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")
    ] = _DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option(help="Keep this much probability; 1 keeps all.")] = _DEFAULTS.top_p,
    min_p: Annotated[
        float, typer.Option(help="Keep tokens this probable, relative to the best one.")
    ] = _DEFAULTS.min_p,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    repeat_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens seen before less likely.")
    ] = _DEFAULTS.repeat_penalty,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Complete prompts and print the texts; figures go to standard error."""
    texts = _read_prompts(prompts, file)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repeat_penalty=repeat_penalty,
        stop=tuple(stop or ()),
    )
    options = {"stages": stages, "device": device.value, "max_context": context, "max_sequences": sequences}
    with loaded_model(model, **options) as loaded:
        show = _print_json if as_json else _print_text
        show(loaded, _as_prompts(texts, chat), texts, params)


def _read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    lines = [line for line in read_lines(file) if line.strip()] if file is not None else []
    texts = [*(prompts or []), *lines]
    if not texts:
        raise ParameterError('give a prompt, such as: redshard generate MODEL.gguf "Once upon a time"')
    return texts


def _as_prompts(texts: list[str], chat: bool) -> list[Prompt]:
    return [[{"role": "user", "content": text}] if chat else text for text in texts]


def _print_text(loaded: Loaded, prompts: list[Prompt], texts: list[str], params: SamplingParams) -> None:
    """One prompt: its answer as it grows. More: each under its prompt, in order, when it is its turn."""
    stopwatch = Stopwatch()
    console = Console(highlight=False, markup=False)
    shown = -1
    for index, piece, is_last in _in_order(stopwatch.watch(loaded.llm.stream(prompts, params)), len(prompts)):
        if index > shown and len(prompts) > 1:
            console.print(Rule(texts[index].replace("\n", " ")[: console.width - 8], align="left"))
        shown = index
        print(piece, end="\n" if is_last else "", flush=True)
    print(stopwatch.figures(loaded.load_s, loaded.worker_bytes()), file=sys.stderr)


def _in_order(chunks: Iterator[CompletionChunk], n_prompts: int) -> Iterator[tuple[int, str, bool]]:
    """(prompt, text, whether that is its end), one prompt after the other, as early as possible."""
    waiting = [""] * n_prompts
    ended = [False] * n_prompts
    turn = 0
    for chunk in chunks:
        waiting[chunk.index] += chunk.text
        ended[chunk.index] = chunk.finish_reason is not None
        while turn < n_prompts and (waiting[turn] or ended[turn]):
            yield turn, waiting[turn], ended[turn]
            waiting[turn] = ""
            if not ended[turn]:
                break
            turn += 1


def _print_json(loaded: Loaded, prompts: list[Prompt], texts: list[str], params: SamplingParams) -> None:
    stopwatch = Stopwatch()
    answers: list[dict[str, Any]] = [{"prompt": text, "text": "", "token_ids": []} for text in texts]
    for chunk in stopwatch.watch(loaded.llm.stream(prompts, params)):
        answer = answers[chunk.index]
        answer["text"] += chunk.text
        answer["token_ids"] += chunk.token_ids
        answer["finish_reason"] = chunk.finish_reason
    figures = stopwatch.figures(loaded.load_s, loaded.worker_bytes())
    print(json.dumps({"completions": answers, "figures": figures.to_dict()}, indent=2, ensure_ascii=False))
