"""Draws the losses that training logged, of one run or of runs that went on from one another.

python -m demo_model.plot_losses runs/first/losses.csv runs/demo/losses.csv losses.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

#: Losses are logged with five decimals; one that is logged as zero is drawn here.
_SMALLEST = 1e-5


def read_losses(runs: list[Path]) -> list[dict[str, float]]:
    """The rows of all files, with the tokens of a later run counted on from the run before it."""
    rows: list[dict[str, float]] = []
    for run in runs:
        before = rows[-1]["tokens"] if rows else 0.0
        with run.open() as file:
            for line in csv.DictReader(file):
                row = {name: float(value) for name, value in line.items()}
                rows.append(row | {"tokens": before + row["tokens"]})
    return rows


def plot(runs: list[Path], picture: Path) -> None:
    """Writes a picture of training and held-out loss over the tokens seen."""
    rows = read_losses(runs)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    tokens = [row["tokens"] / 1e6 for row in rows]
    training = [max(row["training_loss"], _SMALLEST) for row in rows]
    axes.plot(tokens, training, label="training, one batch", linewidth=1)
    axes.plot(tokens, [row["held_out_loss"] for row in rows], label="held out", linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("loss of reply tokens, nats")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    *runs, picture = map(Path, sys.argv[1:])
    plot(runs, picture)
