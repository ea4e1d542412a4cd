"""Held-out accuracy of GGUF files by task, through Redshard's batched generation with greedy decoding.

    python -m demo_model.evaluate loader/models/demo.gguf runs/demo/demo-f16.gguf --questions 500

Prints a Markdown table with one column a file, and wrong replies with `--show-wrong`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from demo_model.corpus import TASKS, held_out_examples

from redshard import LLM, SamplingParams
from redshard.cluster.commands.demo_questions import DemoQuestion, is_right

_PARAMS = SamplingParams(temperature=0, max_tokens=160)
_SEQUENCES = 64


def accuracy(model: Path, questions: dict[str, list[DemoQuestion]], show_wrong: bool) -> dict[str, float]:
    """Share of right replies of `model` by task; all questions are in one call, so batches stay full."""
    every = [question for group in questions.values() for question in group]
    prompts = [[{"role": "user", "content": question.prompt}] for question in every]
    with LLM(model, max_context=512, max_sequences=_SEQUENCES) as llm:
        start = time.monotonic()
        replies = [completion.text for completion in llm.generate(prompts, _PARAMS)]
        seconds = time.monotonic() - start
    print(f"{model.name}: {len(every)} questions in {seconds:.0f} s", flush=True)
    right = [is_right(question, reply) for question, reply in zip(every, replies, strict=True)]
    if show_wrong:
        for question, reply, ok in zip(every, replies, right, strict=True):
            if not ok:
                print(f"{question.task}: {question.prompt!r} -> {reply!r}, expected {question.answer!r}")
    shares, start_at = {}, 0
    for task, group in questions.items():
        shares[task] = sum(right[start_at : start_at + len(group)]) / len(group)
        start_at += len(group)
    return shares


def main() -> None:
    """Evaluates the files named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", help="GGUF files")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions a task")
    parser.add_argument("--show-wrong", action="store_true", help="print the replies that are wrong")
    arguments = parser.parse_args()
    questions = {}
    for task in TASKS:
        examples = held_out_examples(task, arguments.questions)
        questions[examples[0].question.task] = [example.question for example in examples]
    columns = [accuracy(model, questions, arguments.show_wrong) for model in arguments.models]
    print(f"| task | {' | '.join(model.name for model in arguments.models)} |")
    print(f"|---{'|---:' * len(columns)}|")
    for task in questions:
        print(f"| {task} | {' | '.join(f'{100 * column[task]:.1f} %' for column in columns)} |")


if __name__ == "__main__":
    main()
