"""The kernels' sources, and what they declare: structures, constants, instances of kernels.

Argument blocks, limits and the sizes of workgroups stand in the sources alone; what Python needs of them it
reads there when it is imported. The sources keep to lines that a few regular expressions understand, and what
does not is an error; the tests have the compiler check that both see the same.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, Any] = {
    "i8": ctypes.c_int8,
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "f16_bits": ctypes.c_uint16,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "float": ctypes.c_float,
}
_CONSTANTS = re.compile(r"^constexpr i32 (\w+ = \d+(?:, \w+ = \d+)*);", re.MULTILINE)
_DECLARATION = re.compile(r"(?:const )?(\w+)(\*?) (\w+(?:\[\w+\])*(?:, \w+(?:\[\w+\])*)*)")


def source_root() -> Path:
    """The directory with `common` and `hip`, device code that is compiled for the GPU at hand.

    Raises:
        FileNotFoundError: the package was installed without its kernels.
    """
    root = Path(__file__).parents[2] / "kernels"
    if not (root / "hip" / "prelude.h").is_file():
        raise FileNotFoundError(f"no kernel sources in {root}; install redshard again")
    return root


@cache
def constants(path: str) -> dict[str, int]:
    """The constants of a source whose value is a number: lines ``constexpr i32 NAME = NUMBER;``.

    Args:
        path: of the source below `source_root()`, as in the other functions.
    """
    lines = (line.split(", ") for line in _CONSTANTS.findall(_text(path)))
    return {name: int(value) for line in lines for name, value in (pair.split(" = ") for pair in line)}


def instances(path: str, macro: str) -> list[tuple[int, ...]]:
    """The arguments of a macro that defines kernels: lines ``MACRO(NUMBER, ...)``, in order."""
    calls = re.findall(rf"^{macro}\((\d+(?:, \d+)*)\)$", _text(path), re.MULTILINE)
    return [tuple(map(int, call.split(", "))) for call in calls]


def declared_in(path: str) -> Callable[[type[ctypes.Structure]], type[ctypes.Structure]]:
    """Give a class the fields that the structure of its name has in a source.

    Pointers become device addresses (plain integers, 0 or None for null). Structures that are fields must
    have their classes before.

    Raises:
        ValueError: the source has no such structure, or a field of another form than those known here.
    """

    def with_fields(structure: type[ctypes.Structure]) -> type[ctypes.Structure]:
        structure._fields_ = _fields(path, structure.__name__)
        _TYPES[structure.__name__] = structure
        return structure

    return with_fields


def _fields(path: str, name: str) -> list[tuple[str, Any]]:
    body = re.search(rf"^struct {name} {{(.*?)}};", _text(path), re.MULTILINE | re.DOTALL)
    if body is None:
        raise ValueError(f"{path} declares no structure {name}")
    fields: list[tuple[str, Any]] = []
    for text in (statement.strip() for statement in body[1].split(";")[:-1]):
        if text.startswith("static constexpr "):
            continue
        declaration = _DECLARATION.fullmatch(text)
        kind, pointer, names = declaration.groups() if declaration else ("", "", "")
        element = ctypes.c_void_p if pointer else _TYPES.get(kind)
        if element is None or (pointer and "," in names):
            raise ValueError(f"{path}: cannot read the field {text!r} of {name}")
        fields += [_field(path, element, declared) for declared in names.split(", ")]
    return fields


def _field(path: str, element: Any, declared: str) -> tuple[str, Any]:
    """A field's name and type from ``name``, ``name[4]`` or ``name[CONSTANT]``."""
    name, *sizes = declared.replace("]", "").split("[")
    for size in reversed(sizes):
        element = element * (int(size) if size.isdigit() else constants(path)[size])
    return name, element


@cache
def _text(path: str) -> str:
    """A source without its comments."""
    return re.sub(r" *//.*", "", (source_root() / path).read_text())
