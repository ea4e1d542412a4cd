"""The documents that tests and scripts here generate."""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from hardware.compiler import compiler_version
from hardware.emulator import ARCHITECTURES

EMULATED = Path(__file__).with_name("EMULATED.md")
KERNELS = Path(__file__).resolve().parents[2] / "KERNELS.md"

_EMULATED_HEAD = """\
# Kernels on the emulator

Each kernel's machine code against numpy: the largest relative error (root of summed squares; of a log
probability, in proportion to 1 + its size) of all cases of `test_amd_emulator.py`. Made by that module with
`WRITE_EMULATED=1`; see README.md.

- date: {date}
- compiler: {compiler}

"""


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table with aligned columns; all but the first two are right-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(line(row) for row in [columns, rule, *rows]) + "\n"


def listed_kernels(document: str) -> list[tuple[str, str]]:
    """Kernel and format of every row of a document's table."""
    rows = re.findall(r"^\| (\w+) +\| (\S*) +\|", document, re.MULTILINE)
    return rows[1:]  # the first names the columns


@dataclass
class EmulatedTable:
    """Largest error of each kernel, format and architecture."""

    errors: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def add(self, kernel: str, form: str, arch: str, error: float) -> None:
        by_arch = self.errors.setdefault((kernel, form), {})
        by_arch[arch] = max(error, by_arch.get(arch, 0.0))

    def write_where_wanted(self) -> None:
        """Write EMULATED.md when WRITE_EMULATED is set."""
        if not os.environ.get("WRITE_EMULATED"):
            return
        rows = [
            [kernel, form, *(f"{by_arch[a]:.1e}" if a in by_arch else "" for a in ARCHITECTURES)]
            for (kernel, form), by_arch in sorted(self.errors.items())
        ]
        head = _EMULATED_HEAD.format(date=datetime.date.today(), compiler=compiler_version())
        EMULATED.write_text(head + markdown_table(["kernel", "format", *ARCHITECTURES], rows))
