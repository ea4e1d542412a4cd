"""The command line's entry: ``redshard COMMAND``. Each command is a module of `redshard.cluster.commands`."""

from __future__ import annotations

import sys
from typing import NoReturn

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 failed while running, 2 bad input, 130 interrupted, 141 nobody reads the output.
    """
    try:
        # Imported here, because that takes a second in which Ctrl-C may come.
        from redshard.cluster.commands.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)
