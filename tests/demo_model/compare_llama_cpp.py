"""Whether Redshard and llama.cpp give the same greedy replies: those of `redshard demo`, and held-out ones.

    python -m demo_model.compare_llama_cpp loader/models/demo.gguf --llama-server PATH_OF_IT --questions 20

Prints a Markdown table by task and every pair of replies that differ. Both read the same file.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo_model.corpus import TASKS, held_out_examples

from redshard import LLM, SamplingParams
from redshard.cluster.commands.demo_questions import QUESTIONS, DemoQuestion, is_right

_CONTEXT, _MAX_TOKENS, _SEQUENCES = 1024, 160, 44
_START_SECONDS = 60


def redshard_replies(model: Path, prompts: list[str]) -> list[str]:
    """Redshard's greedy replies on two stages, batched, as in `redshard demo`."""
    with LLM(model, stages=2, max_context=_CONTEXT, max_sequences=_SEQUENCES) as llm:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        params = SamplingParams(temperature=0, max_tokens=_MAX_TOKENS)
        return [completion.text for completion in llm.generate(chats, params)]


def llama_cpp_replies(server: Path, model: Path, prompts: list[str]) -> list[str]:
    """The greedy replies of llama.cpp's server, one question at a time."""
    with _running(server, model) as address:
        return [_ask(address, prompt) for prompt in prompts]


@contextmanager
def _running(server: Path, model: Path) -> Iterator[str]:
    """The address of a llama-server that has loaded `model`; it is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-c {_CONTEXT} -np 1 --host 127.0.0.1 --port {port}".split()
    command: list[str | Path] = [server, "-m", model, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, server, address)
        yield address
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], server: Path, address: str) -> None:
    for _ in range(2 * _START_SECONDS):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        except (urllib.error.URLError, TimeoutError):
            if process.poll() is not None:
                raise SystemExit(f"{server} ended with status {process.returncode}") from None
            time.sleep(0.5)
    raise SystemExit(f"{server} was not ready after {_START_SECONDS} s")


def _ask(address: str, prompt: str) -> str:
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "cache_prompt": False,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main() -> None:
    """Compares the two on the file named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file of the demo model")
    parser.add_argument("--llama-server", type=Path, required=True, help="llama.cpp's llama-server")
    parser.add_argument("--questions", type=int, default=20, help="held-out questions a task")
    arguments = parser.parse_args()

    groups: dict[str, list[DemoQuestion]] = {"`redshard demo`": list(QUESTIONS)}
    for task in TASKS:
        questions = [example.question for example in held_out_examples(task, arguments.questions)]
        groups[questions[0].task] = questions
    prompts = [question.prompt for group in groups.values() for question in group]
    ours = redshard_replies(arguments.model, prompts)
    theirs = llama_cpp_replies(arguments.llama_server, arguments.model, prompts)

    print("| task | questions | same reply | Redshard right | llama.cpp right |")
    print("|---|---:|---:|---:|---:|")
    start = 0
    for name, group in groups.items():
        a, b = ours[start : start + len(group)], theirs[start : start + len(group)]
        start += len(group)
        same, right, right_there = sum(map(str.__eq__, a, b)), _n_right(group, a), _n_right(group, b)
        print(f"| {name} | {len(group)} | {same} | {right} | {right_there} |")
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        if mine != other:
            print(f"\n{prompt}\n  Redshard:  {mine}\n  llama.cpp: {other}")


def _n_right(questions: list[DemoQuestion], replies: list[str]) -> int:
    return sum(map(is_right, questions, replies))


if __name__ == "__main__":
    main()
