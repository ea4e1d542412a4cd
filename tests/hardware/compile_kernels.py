"""Compile every kernel of kernels/hip for every AMD target and write what each takes to KERNELS.md.

    python tests/hardware/compile_kernels.py            # writes the document
    python tests/hardware/compile_kernels.py --check    # compares with it and writes nothing

Fails on a compiler error, on scratch memory, on spilled vector registers, and on more shared memory than a
kernel may have.
The figures depend on the compiler: another one than the document's is held to the limits and the list of
kernels alone.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hardware.code_object import CodeObject, Kernel  # noqa: E402
from hardware.compiler import CompileError, compile_source, compiler, compiler_version  # noqa: E402
from hardware.tables import KERNELS, listed_kernels, markdown_table  # noqa: E402

from redshard.worker.device.support import GPU_WEIGHT_TYPES  # noqa: E402

TARGETS = ("gfx906", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201")
#: Head and value dimensions, query heads of a cache head.
HEADS = ((64, 64, 7), (80, 80, 4), (128, 128, 8), (256, 256, 4))

LDS_BYTES = 64 * 1024
#: Static shared memory of a workgroup on NVIDIA GPUs, whose kernels are laid out as those of this target are:
#: 32 lanes, matrix operands of 4 registers.
NVIDIA_SHARED_BYTES, LIKE_NVIDIA = 48 * 1024, "gfx1201"

_HEAD = """\
# What the kernels take

Every kernel of `kernels/hip` on every target: vector registers / scalar registers / bytes of local data
share of a workgroup. No kernel uses scratch memory or spills vector registers; `+n` are scalar
registers kept in lanes of vector registers. Formats are those of the weights; of attention, dimensions
of a head's key and value and query heads of a cache head. Made by `tests/hardware/compile_kernels.py`.

- compiler: {compiler}

"""


@dataclass(frozen=True, slots=True)
class Unit:
    """One translation unit with its parameters, and the name of these in the table."""

    source: str
    macros: tuple[tuple[str, int], ...] = ()
    form: str = ""
    only: str = ""  # kernels to list: those whose name begins so


def units() -> list[Unit]:
    """Everything that is compiled for a target."""
    found = [Unit("planes"), Unit("rope_store"), Unit("rows"), Unit("sample"), Unit("tables")]
    for weight_type in GPU_WEIGHT_TYPES:
        macros = (("WEIGHT_TYPE", weight_type.ggml_id),)
        found += [
            Unit("rows", macros, weight_type.name, only="embed"),
            Unit("matmul_vector", macros, weight_type.name),
            Unit(
                "matmul_tile_float" if weight_type.block_elements == 1 else "matmul_tile",
                macros,
                weight_type.name,
            ),
        ]
    for head_dim, value_dim, group in HEADS:
        macros = (("HEAD_DIM", head_dim), ("VALUE_DIM", value_dim), ("HEADS_PER_KV", group))
        found.append(Unit("attention", macros, f"{head_dim}/{value_dim}/{group}"))
    return found


def compile_unit(unit: Unit, target: str) -> list[Kernel]:
    """The kernels of a unit on a target. Raises CompileError."""
    code = CodeObject(compile_source(f"{unit.source}.hip", target, unit.macros))
    return [kernel for name, kernel in code.kernels.items() if name.startswith(unit.only)]


def complaints(kernel: Kernel, form: str, target: str) -> list[str]:
    """What is wrong with a kernel, in words."""
    name = f"{kernel.name} {form} on {target}"
    found = []
    if kernel.scratch_bytes or kernel.spilled_vgprs:
        found.append(
            f"{name} uses {kernel.scratch_bytes} bytes of scratch, spills {kernel.spilled_vgprs} registers"
        )
    allowed = NVIDIA_SHARED_BYTES if target == LIKE_NVIDIA else LDS_BYTES
    if kernel.lds_bytes > allowed:
        found.append(f"{name} takes {kernel.lds_bytes} bytes of local data share; {allowed} are allowed")
    return found


def cell(kernel: Kernel) -> str:
    """A kernel's figures in the table."""
    spilled = f"+{kernel.spilled_sgprs}" if kernel.spilled_sgprs else ""
    return f"{kernel.vgprs} / {kernel.sgprs}{spilled} / {kernel.lds_bytes}"


def document(cells: dict[tuple[str, str], dict[str, str]]) -> str:
    """KERNELS.md from the cells of each kernel, format and target."""
    rows = [[*key, *(by_target.get(target, "") for target in TARGETS)] for key, by_target in cells.items()]
    return _HEAD.format(compiler=compiler_version()) + markdown_table(["kernel", "format", *TARGETS], rows)


def compile_all(jobs: int) -> tuple[str, list[str]]:
    """The document, and all complaints."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    found: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [(u, t, pool.submit(compile_unit, u, t)) for u in units() for t in TARGETS]
        for unit, target, future in futures:
            try:
                kernels = future.result()
            except CompileError as error:
                found.append(str(error))
                continue
            for kernel in kernels:
                cells.setdefault((kernel.name, unit.form), {})[target] = cell(kernel)
                found += complaints(kernel, unit.form, target)
    for (name, form), by_target in cells.items():
        found += [f"{name} {form} is missing for {target}" for target in TARGETS if target not in by_target]
    return document(cells), found


def difference(written: str, made: str) -> list[str]:
    """How the document differs from what was made now, as far as the compilers allow to tell."""
    if f"- compiler: {compiler_version()}\n" not in written:
        written, made = (
            "".join(f"{name} {form}\n" for name, form in listed_kernels(text)) for text in (written, made)
        )
    before, after = written.splitlines(), made.splitlines()
    return list(difflib.unified_diff(before, after, KERNELS.name, "compiled", lineterm="", n=0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help=f"compare with {KERNELS.name}, write nothing")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    options = parser.parse_args(arguments)
    if not compiler():
        print("clang-19 is not installed", file=sys.stderr)
        return 2
    made, found = compile_all(options.jobs)
    if options.check:
        found += difference(KERNELS.read_text() if KERNELS.exists() else "", made)
    elif not found:
        KERNELS.write_text(made)
    for complaint in found:
        print(complaint, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
