"""Draws the losses that training logged.

python -m demo_model.plot_losses runs/demo/losses.csv losses.png
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure


def plot(losses: Path, picture: Path) -> None:
    """Writes a picture of training and held-out loss over the tokens seen."""
    with losses.open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    tokens = [row["tokens"] / 1e6 for row in rows]
    axes.plot(tokens, [row["training_loss"] for row in rows], label="training, one batch", linewidth=1)
    axes.plot(tokens, [row["held_out_loss"] for row in rows], label="held out", linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("loss of reply tokens, nats")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
