"""The stand-in HIP runtime of ``tests/standin``: built on first use, loaded into this process or into others.

hip-python takes a library that is loaded under the name it looks for; other processes find it through
LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "standin"
KERNELS = Path(__file__).parents[2] / "kernels"
LIBRARIES = {"libamdhip64.so": ("runtime.cpp", "workgroup.cpp"), "libhiprtc.so": ("compiler.cpp",)}


@cache
def directory() -> Path:
    """Where the libraries are; they are compiled once a version and user, then kept."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    built = Path(tempfile.gettempdir()) / f"redshard-standin-{os.getuid()}" / digest.hexdigest()[:16]
    if not built.is_dir():
        built.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as temporary:
            for name, sources in LIBRARIES.items():
                _compile(Path(temporary) / name, [SOURCES / source for source in sources])
            try:
                os.rename(temporary, built)
            except OSError:  # another process was first
                assert built.is_dir()
            else:
                os.mkdir(temporary)  # for the context manager to remove
    return built


def _compile(library: Path, sources: list[Path]) -> None:
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", f"-Wl,-soname,{library.name}"]
    subprocess.run(["g++", *flags, f"-I{KERNELS}", *map(str, sources), "-o", str(library)], check=True)


@cache
def load() -> ctypes.CDLL:
    """Load both libraries; hip-python finds them from then on."""
    runtime = ctypes.CDLL(str(directory() / "libamdhip64.so"), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    ctypes.CDLL(str(directory() / "libhiprtc.so"))
    runtime.standin_count.restype = ctypes.c_long
    return runtime


def count(what: str) -> int:
    """How often something happened here: "allocations", "live allocations", "launches" or "replays"."""
    return load().standin_count(what.encode())


def activate(monkeypatch: pytest.MonkeyPatch, **settings: str | int) -> None:
    """Give this process stand-in GPUs (see `environment`) and forget what happened to earlier ones."""
    for name in list(os.environ):
        if name.startswith("STANDIN_HIP_") or name.endswith("_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)
    for name, value in environment(**settings).items():
        monkeypatch.setenv(name, value)
    load().standin_reset()


def environment(**settings: str | int) -> dict[str, str]:
    """What a process needs to see stand-in GPUs.

    Args:
        settings: STANDIN_HIP_ variables by the rest of their names (``devices=2``); one device if not said.
    """
    settings = {"devices": 1} | settings
    chosen = {f"STANDIN_HIP_{name.upper()}": str(value) for name, value in settings.items()}
    paths = [str(directory()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return chosen | {"LD_LIBRARY_PATH": ":".join(paths), "REDSHARD_CACHE": str(directory() / "kernels")}
