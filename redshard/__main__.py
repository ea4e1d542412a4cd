"""``python -m redshard`` is the command line."""

from redshard.cluster.commands.cli import main

main()
