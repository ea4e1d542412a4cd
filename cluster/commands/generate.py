"""``redshard generate``: completions of prompts, streamed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from annotated_types import Ge, Le, Lt
from rich.console import Console
from rich.rule import Rule

from redshard.cluster.client.prompts import Prompt
from redshard.cluster.commands.figures import Stopwatch
from redshard.cluster.commands.loading import Loaded, loaded_model
from redshard.cluster.commands.options import (
    ContextOption,
    DeviceName,
    DeviceOption,
    JsonOption,
    ModelArgument,
    SequencesOption,
    StagesOption,
)
from redshard.cluster.commands.text_files import STDIN, read_texts, shown_name, with_stdin_lines
from redshard.cluster.completion import CompletionChunk
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ParameterError

_DEFAULTS = SamplingParams()


def _sampling(name: str, text: str) -> Any:
    """The option of a sampling parameter, in its range; `SamplingParams` minds exclusive lower bounds."""
    least = most = None
    for bound in SamplingParams.model_fields[name].metadata:
        if isinstance(bound, Ge):
            least = cast(float, bound.ge)
        elif isinstance(bound, Le):
            most = cast(float, bound.le)
        elif isinstance(bound, Lt):  # of whole numbers
            most = cast(int, bound.lt) - 1
    return typer.Option(min=least, max=most, help=text)


def generate(
    model: ModelArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts to continue; - stands for the lines of standard input.", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read a prompt from each line of this file; - is standard input.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages of a user.")] = False,
    stages: StagesOption = 1,
    device: DeviceOption = DeviceName.AUTO,
    context: ContextOption = None,
    sequences: SequencesOption = 16,
    max_tokens: Annotated[int, _sampling("max_tokens", "Tokens to generate at most.")] = _DEFAULTS.max_tokens,
    temperature: Annotated[float, _sampling("temperature", "0 is greedy.")] = _DEFAULTS.temperature,
    top_k: Annotated[
        int, _sampling("top_k", "Keep the k most probable tokens; 0 keeps all.")
    ] = _DEFAULTS.top_k,
    top_p: Annotated[
        float, _sampling("top_p", "Keep this much probability, more than 0; 1 keeps all.")
    ] = _DEFAULTS.top_p,
    min_p: Annotated[
        float, _sampling("min_p", "Keep tokens this probable, relative to the best one.")
    ] = _DEFAULTS.min_p,
    seed: Annotated[int | None, _sampling("seed", "The same seed gives the same text.")] = None,
    repeat_penalty: Annotated[
        float, _sampling("repeat_penalty", "Above 1 makes tokens seen before less likely.")
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
    if not prompts and file is None:
        raise ParameterError('give a prompt, such as: redshard generate MODEL.gguf "Once upon a time"')
    texts = [*with_stdin_lines(prompts or ()), *(read_texts(file) if file is not None else ())]
    if not texts:
        raise ParameterError(f"{shown_name(file or Path(STDIN))} has no prompts: it is empty or blank")
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
