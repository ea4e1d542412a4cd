"""That Python reads the kernels' sources as the compiler does."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from redshard.worker.device import arguments, kernel_set, sources
from redshard.worker.device.sources import constants, declared_in, instances, source_root

_MACROS = {"WEIGHT_TYPE": 8, "HEAD_DIM": 64, "VALUE_DIM": 64, "HEADS_PER_KV": 8}
HEADER = "common/arguments.h"


def structures(module: object) -> list[type[ctypes.Structure]]:
    """The structures that a module declares."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value.__module__ == getattr(module, "__name__", "")
    ]


def check_with_compiler(path: str, claims: list[str]) -> None:
    """Let a compiler see a source and what is claimed of it."""
    source = f'#include <cstddef>\n#include "{path}"\n' + "".join(f"static_assert({c});\n" for c in claims)
    flags = [f"-I{source_root()}", *(f"-D{name}={value}" for name, value in _MACROS.items())]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-w", "-x", "c++", *flags, "-"]
    run = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def claims_of(structure: type[ctypes.Structure]) -> list[str]:
    """Where a structure's fields lie."""
    name = structure.__name__
    claims = [f"sizeof({name}) == {ctypes.sizeof(structure)}"]
    for field, *_ in structure._fields_:
        place = getattr(structure, field)
        claims += [
            f"offsetof({name}, {field}) == {place.offset}",
            f"sizeof({name}::{field}) == {place.size}",
        ]
    return claims


def test_every_structure_of_the_header_has_its_class_and_layout() -> None:
    declared = structures(arguments)
    text = (source_root() / HEADER).read_text()
    assert [f"struct {structure.__name__} {{" for structure in declared] == [
        line.strip() for line in text.splitlines() if line.startswith("struct ")
    ]
    check_with_compiler(HEADER, [claim for structure in declared for claim in claims_of(structure)])


def test_layouts_of_the_kernel_set() -> None:
    declared = structures(kernel_set)
    assert len(declared) == 2
    check_with_compiler("hip/planes.hip", [claim for structure in declared for claim in claims_of(structure)])
    for quant_type, fields in kernel_set.PLANES.items():
        assert sorted(byte for start, n in fields for byte in range(start, start + n)) == [
            *range(quant_type.block_bytes)
        ]


@pytest.mark.parametrize(
    "path", [HEADER, *(f"hip/{path.name}" for path in sorted((source_root() / "hip").glob("*.hip")))]
)
def test_constants(path: str) -> None:
    assert constants(path) or path == "hip/matmul_tile_float.hip"
    check_with_compiler(path, [f"{name} == {value}" for name, value in constants(path).items()])


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source that may hold anything."""
    monkeypatch.setattr(sources, "source_root", lambda: tmp_path)
    sources._text.cache_clear()
    sources.constants.cache_clear()
    yield tmp_path / "source.h"
    sources._text.cache_clear()
    sources.constants.cache_clear()


def test_what_is_read(written: Path) -> None:
    written.write_text(
        """constexpr i32 ONE = 1;   // constexpr i32 TWO = 2;
constexpr i32 THREE = 3, FOUR = 4;
constexpr i32 FIVE = FOUR + 1;
  constexpr i32 INNER = 6;
struct Pair { i8 x, y[THREE]; };   // its class comes first
struct Everything {
  static constexpr i32 elements = 32;
  const float* a;   // float b;
  Pair pair[2][FOUR];
  i64 c;
};
#define MAKE(a, b) a b
MAKE(16, 32)
MAKE(64, 128)
MAKE(a, b)
"""
    )
    assert constants("source.h") == {"ONE": 1, "THREE": 3, "FOUR": 4}
    assert instances("source.h", "MAKE") == [(16, 32), (64, 128)]
    pair = declared_in("source.h")(type("Pair", (ctypes.Structure,), {}))
    everything = declared_in("source.h")(type("Everything", (ctypes.Structure,), {}))
    assert np.dtype(pair) == np.dtype([("x", np.int8), ("y", np.int8, 3)])
    assert [name for name, _ in everything._fields_] == ["a", "pair", "c"]
    assert ctypes.sizeof(everything) == 8 + 4 * 8 + 8


@pytest.mark.parametrize(
    "field",
    [
        "float *a",
        "float* a, b",
        "double a",
        "i32 a : 4",
        "i32 a = 3",
        "void (*call)(i32)",
        "struct { i32 b",
        "",
    ],
)
def test_what_is_not_understood_is_refused(written: Path, field: str) -> None:
    written.write_text(f"struct Odd {{\n  i32 first;\n  {field};\n}};\n")
    with pytest.raises(ValueError, match=r"source\.h: cannot read the field .* of Odd"):
        declared_in("source.h")(type("Odd", (ctypes.Structure,), {}))
    with pytest.raises(ValueError, match=r"source\.h declares no structure Other"):
        declared_in("source.h")(type("Other", (ctypes.Structure,), {}))
