"""The command line: ``redshard COMMAND``. Each command is a module of `cluster.commands`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from cluster.commands.bench import bench
from cluster.commands.demo import demo
from cluster.commands.doctor import doctor
from cluster.commands.generate import generate
from cluster.commands.inspect import inspect
from cluster.commands.plan import plan
from cluster.commands.tokenize import tokenize
from cluster.errors import ModelError, RedshardError
from worker.device.base import DeviceError
from worker.memory_pool import PoolError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Serves GGUF language models across the AMD GPUs of a Ray cluster; without GPUs, on CPUs.",
)
for command in (generate, demo, inspect, plan, tokenize, bench, doctor):
    app.command()(command)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens; show tracebacks.")] = False,
) -> None:
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def main() -> None:
    """Run the command line. An error is one line on standard error, a traceback only with ``--debug``.

    Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted.
    """
    try:
        sys.exit(app(args=sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if sys.argv[1:2] == ["--debug"]:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(_exit_code(error))


def _sentence(error: Exception) -> str:
    if _is_usage_error(error):
        return f"{error.format_message()} (see `redshard --help`)"  # type: ignore[attr-defined]
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
