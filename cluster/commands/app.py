"""The commands as one application: their common options, and how each of them ends."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from importlib import metadata
from typing import Annotated

import typer

from redshard.cluster.commands.bench import bench
from redshard.cluster.commands.demo import demo
from redshard.cluster.commands.doctor import doctor
from redshard.cluster.commands.generate import generate
from redshard.cluster.commands.inspect import inspect
from redshard.cluster.commands.plan import plan
from redshard.cluster.commands.tokenize import tokenize
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ModelError, ParameterError, PromptError, RedshardError
from redshard.worker.device.base import DeviceError
from redshard.worker.memory.pool import PoolError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_CLOSED_PIPE = 1, 2, 141

#: The options that set parameters of `LLM` and `SamplingParams`, by the parameters' names.
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in ("stages", *SamplingParams.model_fields)}
_OPTIONS |= {"max_context": "--context", "max_sequences": "--sequences"}
#: A parameter at the start of a complaint; other words than the last two are also plain English.
_PARAMETER = re.compile(
    rf"^(?:sampling parameter )?({'|'.join(_OPTIONS)})(?:\.\d+)?(?= is |=)|\b(max_context|max_sequences)\b"
)

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves GGUF language models across the AMD GPUs of a Ray cluster; without GPUs, on CPUs.",
)
for command in (generate, demo, inspect, plan, tokenize, bench, doctor):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            print("redshard", metadata.version("redshard"))
        except metadata.PackageNotFoundError:
            print("redshard, not installed but run from its source")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens; show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def run(arguments: list[str]) -> int:
    """Run a command and give its exit code.

    An error is one line on standard error, a traceback only with ``--debug``.
    """
    # As what is read: text is UTF-8 whatever the locale.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        _check_text(arguments)
        return _invoke(arguments or ["--help"])
    except (BrokenPipeError, SystemExit):  # rich makes the one into the other
        # What is still buffered must go somewhere at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except Exception as error:
        if arguments[:1] == ["--debug"]:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return _exit_code(error)


def _check_text(arguments: list[str]) -> None:
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ParameterError(
                f"argument {number}, {os.fsencode(argument)!r}, is no text in the encoding of the locale, "
                f"{sys.getfilesystemencoding()}"
            ) from None


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        # Not command(): that answers Ctrl-C and closed pipes in its own way.
        with command.make_context("redshard", arguments) as context:
            command.invoke(context)
        code = 0
    except typer.Exit as ended:
        code = ended.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _sentence(error: Exception) -> str:
    if _is_usage_error(error):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "redshard COMMAND"
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return f"{message} (see `{command} --help`)"
    if isinstance(error, (ParameterError, PromptError)):
        return _PARAMETER.sub(lambda match: _OPTIONS[match[1] or match[2]], str(error))
    if isinstance(error, (RedshardError, DeviceError, PoolError, ValueError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error} (run `redshard --debug ...` for the traceback)"


def _exit_code(error: Exception) -> int:
    # Everything the loader refuses is a ValueError: broken files, unknown architectures, plans too large.
    bad_input = _is_usage_error(error) or isinstance(error, (ValueError, ModelError, OSError))
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


def _is_usage_error(error: Exception) -> bool:
    """Whether the parser refused the arguments; typer has moved the class, but never this method."""
    return hasattr(error, "format_message")
