"""``redshard demo``: the shipped model answers questions through a pipeline of two workers, and is marked."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from redshard.cluster.client.prompts import Prompt
from redshard.cluster.commands.demo_questions import QUESTIONS, is_right
from redshard.cluster.commands.figures import Stopwatch
from redshard.cluster.commands.loading import Loaded, loaded_model
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.loader.units import format_bytes

MODEL = "demo"
STAGES = 2
_PARAMS = SamplingParams(temperature=0, max_tokens=200)


def demo(
    ask: Annotated[
        list[str] | None, typer.Option(help="Ask this instead; may be repeated.", show_default=False)
    ] = None,
) -> None:
    """Let the model that ships with Redshard answer a batch of questions on two workers of this machine."""
    console = Console(highlight=False)
    with loaded_model(MODEL, stages=STAGES, max_context=512, max_sequences=len(QUESTIONS)) as loaded:
        stopwatch = Stopwatch()
        if ask:
            _answer(console, loaded, stopwatch, ask)
        else:
            _examine(console, loaded, stopwatch)
        console.print(f"\n{stopwatch.figures(loaded.load_s, loaded.worker_bytes())}", style="dim")
        console.print(_pools(loaded))
    _show_what_next(console)


def _as_chat(texts: list[str]) -> list[Prompt]:
    return [[{"role": "user", "content": text}] for text in texts]


def _answer(console: Console, loaded: Loaded, stopwatch: Stopwatch, questions: list[str]) -> None:
    answers = [""] * len(questions)
    for chunk in stopwatch.watch(loaded.llm.stream(_as_chat(questions), _PARAMS)):
        answers[chunk.index] += chunk.text
        if chunk.finish_reason is not None:
            console.print(questions[chunk.index], style="bold", markup=False)
            console.print(answers[chunk.index].strip() + "\n", markup=False)


def _examine(console: Console, loaded: Loaded, stopwatch: Stopwatch) -> None:
    """All questions as one batch; each answer is shown and marked as soon as it is complete."""
    answers = [""] * len(QUESTIONS)
    n_right = 0
    for chunk in stopwatch.watch(loaded.llm.stream(_as_chat([q.prompt for q in QUESTIONS]), _PARAMS)):
        answers[chunk.index] += chunk.text
        if chunk.finish_reason is None:
            continue
        question, answer = QUESTIONS[chunk.index], " ".join(answers[chunk.index].split())
        right = is_right(question, answer)
        n_right += right
        console.print("[green]right[/]" if right else "[red]wrong[/]", end="  ")
        console.print(question.prompt, style="bold", markup=False)
        console.print(f"       {answer}", markup=False)
    console.print(f"\n{n_right} of {len(QUESTIONS)} answers are right.")


def _pools(loaded: Loaded) -> Table:
    table = Table(title="What each worker holds in its memory pool", title_justify="left")
    for column in ("worker", "layers", "weights", "KV cache", "other", "allocations"):
        table.add_column(column, justify="right")
    workers = loaded.llm.stats()["workers"]
    for index, (worker, memory) in enumerate(zip(workers, loaded.llm.memory_map(), strict=True)):
        table.add_row(
            f"{index} ({worker['device']})",
            f"{worker['first_layer']}-{worker['end_layer'] - 1}",
            *(format_bytes(worker[key]) for key in ("weight_bytes", "kv_bytes", "other_bytes")),
            str(memory["allocations"]),
        )
    return table


def _show_what_next(console: Console) -> None:
    console.print("\nTry next:", style="bold")
    for command in (
        'redshard demo --ask "What is 47 times 86?"',
        'redshard generate demo --chat "Tell me a story."',
        'redshard generate MODEL.gguf "Once upon a time" --stages 2',
        "redshard bench MODEL.gguf",
    ):
        console.print(f"  {command}", markup=False)
