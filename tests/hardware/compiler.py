"""The kernels of kernels/hip as machine code of an AMD GPU, by clang-19 and without ROCm."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from redshard.worker.device.sources import source_root

_OFFLOAD_OPTIONS = (
    "-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", "-nogpulib", "-nogpuinc", "-O3",
    "-std=c++17",
    "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-parameter", "-Wno-pass-failed",
)  # fmt: skip


class CompileError(Exception):
    """A kernel does not compile; the message is the compiler's."""


@cache
def compiler() -> Path | None:
    """Clang 19 where it is installed: on PATH or where Debian puts it."""
    places = [shutil.which("clang-19"), "/usr/lib/llvm-19/bin/clang-19"]
    return next((Path(place) for place in places if place and os.access(place, os.X_OK)), None)


@cache
def compiler_version() -> str:
    """First line of `clang-19 --version`."""
    assert compiler(), "clang-19 is not installed"
    run = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0]


def macro_options(macros: Sequence[tuple[str, int]]) -> list[str]:
    """How macros are given to the compiler."""
    return [f"-D{name}={value}" for name, value in macros]


def compile_source(
    source: str, arch: str, macros: Sequence[tuple[str, int]] = (), options: Sequence[str] = ()
) -> bytes:
    """The code object (ELF) of a translation unit.

    Args:
        source: file name in kernels/hip.
        arch: target such as "gfx942".
        macros: the source's parameters.
        options: further ones of the compiler.

    Raises:
        CompileError: an error, or a warning that is none of the ignored ones.
    """
    root = source_root()
    target = [f"--offload-arch={arch}", f"-I{root}", *macro_options(macros), *options]
    command = [str(compiler()), *_OFFLOAD_OPTIONS, *target, str(root / "hip" / source), "-o", "-"]
    run = subprocess.run(command, capture_output=True, check=False)
    if run.returncode:
        raise CompileError(f"{source} for {arch} {dict(macros)}:\n{run.stderr.decode(errors='replace')}")
    return run.stdout
