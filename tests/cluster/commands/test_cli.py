"""The command line: what it prints, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import tiny_config, write_model

from redshard.cluster.commands import cli, options, tokenize
from redshard.cluster.commands.demo_questions import QUESTIONS

Run = Callable[..., "Outcome"]
#: How to run the command line in a process of its own.
OWN_PROCESS: dict[str, Any] = {
    "env": os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "encoding": "utf-8",
    "timeout": 60,
}


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["redshard", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen3", n_layers=3, context_length=256)
    return write_model(tmp_path_factory.mktemp("cli") / "tiny.gguf", config)


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")
    for word in words:
        assert word in outcome.err


def test_inspect_shows_the_model(run: Run, model: Path) -> None:
    outcome = run("inspect", model, "--tensors")
    assert outcome.code == 0
    for text in ("qwen3", "n layers", "blk.2.ffn_down.weight", "Tensors by type"):
        assert text in outcome.out


def test_inspect_as_json(run: Run, model: Path) -> None:
    summary = json.loads(run("inspect", model, "--json").out)
    assert summary["file"]["architecture"] == "qwen3"
    assert summary["hyperparameters"]["n_layers"] == 3
    assert sum(row["tensors"] for row in summary["types"]) > 20


def test_plan_puts_every_layer_somewhere(run: Run, model: Path) -> None:
    plan = json.loads(run("plan", model, "--gpus", "2x1GiB,1x2GiB", "--context", 64, "--json").out)
    layers = [range(stage["first"], stage["last"]) for stage in plan["stages"]]
    assert [layer for stage in layers for layer in stage] == [0, 1, 2]
    assert plan["kv_tokens"] >= 64
    assert (plan["context"], plan["sequences"], plan["kv_tokens_asked"]) == (64, 1, 64)


def test_plan_says_what_would_fit(run: Run, model: Path) -> None:
    refused(run("plan", model, "--gpus", "1MiB"), "would hold them")
    refused(run("plan", model, "--gpus", "lots"), "'lots'", "4x16GiB")
    refused(run("plan", model, "--gpus", "1GiB", "--context", 257), "257", "256")
    refused(run("plan", model, "--gpus", "1GiB", "--sequences", 10**20), "'--sequences'", "4096")


def test_tokenize_prints_a_line_a_text(run: Run, model: Path, tmp_path: Path) -> None:
    lines = run("tokenize", model, "ab", "b").out.splitlines()
    assert len(lines) == 2
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"ab"\n"b"\n')
    assert run("tokenize", model, "--jsonl", texts).out.splitlines() == lines


def test_tokenize_refuses_what_is_no_json_string(run: Run, model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"ab"\n{"not": "a string"}\n')
    refused(run("tokenize", model, "--jsonl", texts), "line 2", "JSON string")
    refused(run("tokenize", model), "--jsonl")
    texts.write_text('"\\ud800"\n')
    refused(run("tokenize", model, "--jsonl", texts), "line 1", "surrogate")


def test_tokenize_prints_all_or_nothing_and_skips_blank_lines(run: Run, model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('"ab"\n\nno JSON\n')
    outcome = run("tokenize", model, "--jsonl", texts)
    refused(outcome, "line 3")
    assert outcome.out == ""
    texts.write_text('"ab"\n\n"b"\n\n')
    assert run("tokenize", model, "--jsonl", texts).out == run("tokenize", model, "ab", "b").out


def test_a_dash_among_the_texts_is_standard_input(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\n\nb\n")))
    assert run("tokenize", model, "a", "-", "c").out == run("tokenize", model, "a", "ab", "b", "c").out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    refused(run("generate", model, "-"), "standard input has no prompts")


@pytest.mark.parametrize("command", ["inspect", "plan", "tokenize", "generate", "bench"])
def test_missing_and_broken_files(run: Run, tmp_path: Path, command: str) -> None:
    options = {"plan": ["--gpus", "1GiB"], "tokenize": ["x"], "generate": ["x"]}.get(command, [])
    refused(run(command, tmp_path / "none.gguf", *options), "none.gguf", "demo")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x03\0\0\0")
    refused(run(command, broken, *options), "broken.gguf", "truncated")
    refused(run(command, "", *options), "name of the model is empty")
    refused(run(command, tmp_path, *options), f"'{tmp_path}' is a directory;")
    refused(run(command, "/dev/null", *options), "'/dev/null' is not a regular file;")


def test_unsupported_architecture_lists_the_known_ones(run: Run, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", tiny_config("llama"), metadata={"general.architecture": "novel"})
    refused(run("generate", path, "x"), "novel", "llama", "qwen2", "qwen3")


def test_invalid_parameters(run: Run, model: Path) -> None:
    refused(run("generate", model, "x", "--temperature", "-1"), "temperature")
    refused(run("generate", model), "give a prompt")
    refused(run("generate", model, "x", "--stages", 6), "error: --stages is 6;", "5")
    refused(run("generate", model, "x", "--context", 257), "error: --context is 257;", "256")
    refused(run("generate", model, "x", "--top-p", 0), "error: --top-p=0.0:")
    refused(run("generate", model, "x", "--stop", ""), "error: --stop='':")
    refused(run("bench", model, "--prompt", 256), "error: --prompt is 256;", "255")
    refused(run("bench", model, "--tokens", 256), "error: --tokens is 256;", "255")


def test_help_names_the_ranges(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from redshard.cluster.client import llm

    assert options.MAX_SEQUENCES == llm.MAX_SEQUENCES
    monkeypatch.setenv("COLUMNS", "150")
    shown = run("generate", "--help").out
    for text in ("[1<=x<=4096]", "[0<=x<=2147483647]", "[0<=x<=18446744073709551615]", "[x>=2]", "[0<=x<=1]"):
        assert text in shown


@pytest.mark.parametrize("command", ["generate", "tokenize"])
def test_arguments_that_are_no_text_are_named(run: Run, model: Path, command: str) -> None:
    refused(run(command, model, "fine", "x\udcff"), "argument 4", r"b'x\xff'")


def test_usage_errors(run: Run, model: Path) -> None:
    refused(run("generate", model, "x", "--top-k", "abc"), "--top-k", "(see `redshard generate --help`)")
    refused(run("generate"), "Missing argument 'model' (see `redshard generate --help`)")
    refused(run("plan", model), "--gpus")
    refused(run("bench", model, "--sequences", 0), "--sequences")
    refused(run("nonsense"), "nonsense", "(see `redshard --help`)")
    refused(run("inspect", "~nobody-of-this-name/model.gguf"), "there is no file")


def test_help_without_arguments(run: Run) -> None:
    outcome = run()
    assert outcome.code == 0
    for command in ("generate", "demo", "inspect", "plan", "tokenize", "bench", "doctor"):
        assert command in outcome.out


def test_version(run: Run) -> None:
    assert re.fullmatch(r"redshard( \d+\.\d+\.\d+|, not installed.*)\n", run("--version").out)


def test_ctrl_c_says_so_in_one_word(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize, "read_lines", interrupt)
    outcome = run("tokenize", "demo", "--jsonl", "-")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


SIGNAL_AT_IMPORT = f"""
import os, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), {int(signal.SIGINT)})

sys.meta_path.insert(0, Interrupt())
from redshard.cluster.commands.cli import main
main()
"""


def test_ctrl_c_while_the_modules_are_imported() -> None:
    process = subprocess.run([sys.executable, "-c", SIGNAL_AT_IMPORT, "--help"], **OWN_PROCESS)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    "arguments", [["inspect", "demo", "--tensors"], ["tokenize", "demo", "a"], ["--help"]]
)
def test_a_closed_pipe_ends_it_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "redshard", *arguments]
        process = subprocess.run(command, **(OWN_PROCESS | {"stdout": writing}))
    finally:
        os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


def test_output_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", tiny_config("llama"), metadata={"general.name": "зима"})
    command = [
        sys.executable,
        "-c",
        "from redshard.cluster.commands.cli import main; main()",
        "inspect",
        str(model),
    ]
    environment = OWN_PROCESS["env"] | {"PYTHONIOENCODING": "ascii"}
    process = subprocess.run(command, **(OWN_PROCESS | {"env": environment}))
    assert process.returncode == 0, process.stderr
    assert "зима" in process.stdout


@pytest.mark.usefixtures("ray_instance")
def test_generate_streams_one_prompt(run: Run, model: Path) -> None:
    options = ("--max-tokens", 5, "--temperature", 0, "--context", 64)
    outcome = run("generate", model, "abc", *options)
    assert outcome.code == 0
    assert outcome.out.endswith("\n")
    assert "generated" in outcome.err
    assert "tok/s" in outcome.err
    answers = json.loads(run("generate", model, "abc", "b", *options, "--json").out)["completions"]
    assert [answer["prompt"] for answer in answers] == ["abc", "b"]
    assert answers[0]["text"] + "\n" == outcome.out


@pytest.mark.usefixtures("ray_instance")
def test_generate_prints_prompts_in_order(run: Run, model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\nsecond\nthird\n")
    outcome = run("generate", model, "--file", prompts, "--max-tokens", 3, "--context", 64, "--stages", 2)
    places = [outcome.out.index(f"{name} ─") for name in ("first", "second", "third")]
    assert places == sorted(places)


@pytest.mark.usefixtures("ray_instance")
def test_a_prompt_longer_than_the_context_is_refused(run: Run, model: Path) -> None:
    refused(run("generate", model, "abc " * 100, "--context", 64), "context", "shorten")


@pytest.mark.usefixtures("ray_instance")
def test_more_gpus_than_the_cluster_has_are_refused(run: Run, model: Path) -> None:
    options = ("--device", "hip", "--stages", 4, "--context", 64)
    refused(run("generate", model, "abc", *options), "4 stages must have 4 GPUs", "has 3")


@pytest.mark.usefixtures("ray_instance")
def test_bench_reports_every_figure(run: Run, model: Path) -> None:
    options = ("--prompt", 32, "--tokens", 4, "--sequences", 3, "--rounds", 1)
    report = json.loads(run("bench", model, *options, "--json").out)
    assert all(rate > 0 for rate in report["throughput"].values())
    assert report["bytes_per_token"] > 0
    assert 0 < report["bandwidth_share"] < 10
    assert {"schedule", "compute", "handoff"} <= set(report["overheads_us"])
    assert "tok/s" in run("bench", model, *options).out


@pytest.mark.usefixtures("ray_instance")
def test_demo_marks_true_answers_and_answers_what_is_asked(run: Run) -> None:
    outcome = run("demo")
    assert outcome.code == 0
    assert f"{len(QUESTIONS)} of {len(QUESTIONS)} answers are right." in outcome.out
    assert all(question.prompt in outcome.out.replace("\n", " ") for question in QUESTIONS)
    asked = run("demo", "--ask", "What is 47 times 86?", "--ask", "What is the capital of Kenya?").out
    assert "4042" in asked
    assert "Nairobi" in asked


@pytest.mark.usefixtures("ray_instance")
def test_generate_knows_the_demo_model_by_name(run: Run) -> None:
    outcome = run("generate", "demo", "What is 47 times 86?", "--chat", "--temperature", 0)
    assert outcome.out.rstrip(".\n").endswith("4042")


def test_commands_that_only_read_the_file_do_not_load_ray(model: Path) -> None:
    code = (
        "import sys; from redshard.cluster.commands import cli\n"
        f"sys.argv = ['redshard', 'inspect', {str(model)!r}]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), stdout=subprocess.DEVNULL)
