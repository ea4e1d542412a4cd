"""The kernels of ``kernels/hip`` for one GPU: which launches make an operation, and the functions they need.

Sizes of workgroups, and what each of them computes, are read from the kernels' sources.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import (
    PARTITION,
    AttentionArguments,
    EmbedArguments,
    MatmulArguments,
    Matrix,
    RmsNormArguments,
    RopeStoreArguments,
    SampleArguments,
    SetTablesArguments,
    SwigluArguments,
)
from redshard.worker.device.base import BlockRun, DeviceError
from redshard.worker.device.kernel_images import image_key, read_image, write_image
from redshard.worker.device.sources import constants, declared_in, instances, source_root
from redshard.worker.device.support import GPU_WEIGHT_TYPES

#: Row counts that `matmul_vector` and `swiglu_vector` are compiled for; other counts take the tile kernels.
#: Tiles would be faster from 8 rows on, but add up in another order: so a row of a step of up to 8 tokens
#: gets the numbers that it gets alone.
VECTOR_ROWS = tuple(rows for (rows,) in instances("hip/matmul_vector.hip", "VECTOR_KERNELS"))
#: Rows up to which launches overlap: longer ones only get in each other's way.
_OVERLAPPING_ROWS = 64
#: A tile that makes fewer workgroups gives way to smaller ones, which leave less of a GPU idle. Found on 132
#: compute units; that every kernel does the same on every GPU is worth more than the last few percent.
FULL_GRID = 96

#: A context is split over workgroups until there are so many, or so many parts of it.
_SPLIT_GROUPS, _MAX_SPLITS = 1024, 8
_PLANES_GROUPS = 1024

_ROWS = constants("hip/rows.hip")
_TABLES = constants("hip/tables.hip")
_ROPE_STORE = constants("hip/rope_store.hip")
_VECTOR = constants("hip/matmul_vector.hip")
_FLOAT_TILE = constants("hip/matmul_tile_float.hip")
_ATTENTION = constants("hip/attention.hip")
_PLANES = constants("hip/planes.hip")
_SAMPLE = constants("hip/sample.hip")


@dataclass(frozen=True, slots=True)
class Tile:
    """What a workgroup of a tile kernel computes.

    Attributes:
        tokens: rows of activations.
        rows: of weights; of the gate and as many of the other matrix in `swiglu_tile_*`.
        waves: of the workgroup; None where it has a fixed number of work-items.
    """

    tokens: int
    rows: int
    waves: int | None = None


def _tiles(operation: str, source: str) -> tuple[Tile, ...]:
    """The tiles that a source has kernels for, by the rows of activations that they are for."""
    found = instances(f"hip/{source}.hip", _tile_kernel(operation, source).upper())
    return tuple(
        Tile(tokens, rows, waves=split[0] * split[1] if split else None) for tokens, rows, *split in found
    )


def _tile_kernel(operation: str, source: str) -> str:
    return f"{operation}_{source.removeprefix('matmul_')}"


TILES = {
    (operation, source): _tiles(operation, source)
    for operation in ("matmul", "swiglu")
    for source in ("matmul_tile", "matmul_tile_float")
}

_TYPES = {quant_type.ggml_id: quant_type for quant_type in GPU_WEIGHT_TYPES}
_FLOAT_TYPES = {quant_type.ggml_id for quant_type in GPU_WEIGHT_TYPES if quant_type.block_elements == 1}


def _fields(block: str, *names: str) -> tuple[tuple[int, int], ...]:
    """Offset and bytes of fields of a block of kernels/common/blocks.h."""
    structure = declared_in("common/blocks.h")(type(block, (ctypes.Structure,), {}))
    fields = [getattr(structure, name) for name in names]
    return tuple((field.offset, field.size) for field in fields)


#: Fields (offset, bytes) of a block in the order of the planes that kernels/hip/formats.h reads.
PLANES: dict[QuantType, tuple[tuple[int, int], ...]] = {
    QuantType.Q4_0: _fields("BlockQ4_0", "qs", "d"),
    QuantType.Q8_0: _fields("BlockQ8_0", "qs", "d"),
    QuantType.Q6_K: _fields("BlockQ6_K", "ql", "qh", "scales", "d"),
}


#: A translation unit and the macros it is compiled with.
_Unit = tuple[str, tuple[tuple[str, int], ...]]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Attributes:
        source: translation unit, without its suffix; macros: what it is compiled with.
        kernel: function in it.
        grid: workgroups; threads: work-items of each.
        arguments: the block the kernel takes by value.
        overlaps: the kernel waits by itself for the launch before it, so it may start earlier. Until then it
            reads weights, which must have been there before that launch.
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    arguments: ctypes.Structure
    macros: tuple[tuple[str, int], ...] = ()
    overlaps: bool = True

    @property
    def unit(self) -> _Unit:
        """What is compiled together."""
        return self.source, self.macros


@declared_in("hip/planes.hip")
class PlaneField(ctypes.Structure):
    """Bytes offset .. offset + nbytes - 1 of every block."""


@declared_in("hip/planes.hip")
class SplitPlanesArguments(ctypes.Structure):
    """The block of ``split_planes``."""


def launches(operation: str, arguments: ctypes.Structure, rows: int, wave_size: int) -> list[Launch]:
    """The launches that make an operation of `arguments.KERNEL_ARGUMENTS`, in order.

    Args:
        operation: its name.
        arguments: its argument block.
        rows: the most rows the step may have; launches cover as many.
        wave_size: lanes of the GPU that run together.

    Raises:
        DeviceError: no such operation, or no kernel for such arguments.
    """
    try:
        plan = _OPERATIONS[operation]
    except KeyError:
        raise DeviceError(
            f"launch of unknown kernel {operation!r}; known are {', '.join(_OPERATIONS)}"
        ) from None
    if rows < 1:
        raise DeviceError(f"{operation}: a launch must cover at least 1 row, not {rows}")
    planned = list(plan(arguments, rows, wave_size))
    if rows > _OVERLAPPING_ROWS:
        planned = [replace(launch, overlaps=False) for launch in planned]
    return planned


def split_planes(run: BlockRun, blocks: int, planes: int) -> Launch:
    """Move a run of blocks at address `blocks` to their places in the planes of their tensor at `planes`."""
    fields, block_bytes = PLANES[run.quant_type], run.quant_type.block_bytes
    arguments = SplitPlanesArguments(
        blocks=blocks,
        planes=planes,
        first_block=run.start // block_bytes,
        blocks_in_all=run.tensor_bytes // block_bytes,
        n_blocks=run.nbytes // block_bytes,
        block_bytes=block_bytes,
        n_fields=len(fields),
        n_groups=min(_PLANES_GROUPS, _groups(run.nbytes // 2, _PLANES["PLANES_THREADS"])),
    )
    for i, field in enumerate(fields):
        arguments.field[i] = PlaneField(*field)
    return Launch(
        "planes",
        "split_planes",
        (arguments.n_groups, 1, 1),
        _PLANES["PLANES_THREADS"],
        arguments,
        overlaps=False,
    )


def attention_scratch_bytes(
    rows: int, sequences: int, n_heads: int, value_dim: int, total_context: int
) -> int:
    """Scratch of `attention`: results of the tiles, and partial results of every partition of the contexts.

    Args:
        rows: tokens of a step.
        sequences: of a step.
        n_heads: query heads.
        value_dim: elements of a value head.
        total_context: positions of all sequences of a step together.
    """
    partitions = total_context // PARTITION + min(rows, sequences)  # the last of each may not be full
    return 4 * n_heads * (rows * value_dim + partitions * (2 + value_dim))


def _set_tables(a: SetTablesArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("tables", "set_tables", (1, 1, 1), _TABLES["TABLES_THREADS"], a)


def _embed(a: EmbedArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("rows", "embed", (rows, 1, 1), _ROWS["ROW_THREADS"], a, _weight_type(a.table))


def _rms_norm(a: RmsNormArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("rows", "rms_norm", (rows, 1, 1), _ROWS["ROW_THREADS"], a)


def _matmul(a: MatmulArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    """A launch for each type among the matrices."""
    by_type: dict[int, list[int]] = {}
    for m in range(a.n_matrices):
        by_type.setdefault(a.w[m].type, []).append(m)
    for members in by_type.values():
        part = a
        if len(by_type) > 1:
            part = MatmulArguments.from_buffer_copy(a)
            part.n_matrices = len(members)
            for place, m in enumerate(members):
                part.w[place], part.y[place] = a.w[m], a.y[m]
        macros = _weight_type(part.w[0])
        heights = [part.w[m].n_rows for m in range(part.n_matrices)]
        if rows in VECTOR_ROWS:
            threads = _VECTOR["VECTOR_THREADS"]
            per_group = _VECTOR["VECTOR_ROWS"] * threads // wave_size
            grid = (sum(_groups(height, per_group) for height in heights), 1, 1)
            yield Launch("matmul_vector", f"matmul_vector_{rows}", grid, threads, part, macros)
        else:
            yield _tile_launch("matmul", part, part.w[0], heights, rows, wave_size)


def _swiglu(a: SwigluArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    if a.gate.type != a.up.type:
        raise DeviceError(
            f"swiglu: gate is {_type_name(a.gate.type)}, up is {_type_name(a.up.type)}; "
            "GPUs have no kernel for different types"
        )
    if rows in VECTOR_ROWS:
        grid, threads = (_groups(a.gate.n_rows, _VECTOR["SWIGLU_ROWS"]), 1, 1), _VECTOR["SWIGLU_THREADS"]
        yield Launch("matmul_vector", f"swiglu_vector_{rows}", grid, threads, a, _weight_type(a.gate))
    else:
        yield _tile_launch("swiglu", a, a.gate, [a.gate.n_rows], rows, wave_size)


def _tile_launch(
    operation: str, a: ctypes.Structure, matrix: Matrix, heights: list[int], rows: int, wave_size: int
) -> Launch:
    """The launch with the smallest tile that holds `rows` rows of activations, if that fills a GPU."""
    macros = _weight_type(matrix)
    source = "matmul_tile_float" if matrix.type in _FLOAT_TYPES else "matmul_tile"
    tiles = TILES[operation, source]
    grids = [
        (_groups(rows, tile.tokens), sum(_groups(height, tile.rows) for height in heights)) for tile in tiles
    ]
    choice = next((i for i, tile in enumerate(tiles) if rows <= tile.tokens), len(tiles) - 1)
    while choice > 0 and math.prod(grids[choice]) < FULL_GRID:
        choice -= 1
    tile, grid = tiles[choice], (*grids[choice], 1)
    kernel = f"{_tile_kernel(operation, source)}_{tile.tokens}"
    threads = tile.waves * wave_size if tile.waves else _FLOAT_TILE["TILE_THREADS"]
    return Launch(source, kernel, grid, threads, a, macros)


def _rope_store(a: RopeStoreArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    most = _ROPE_STORE["HELD"] * wave_size
    if a.head_dim > most:
        raise DeviceError(
            f"rope_store: heads of {a.head_dim} elements are too large; this GPU's kernel holds {most}"
        )
    heads, threads = a.n_heads + 2 * a.n_kv_heads, _ROPE_STORE["ROPE_THREADS"]
    grid = (rows, _groups(heads, threads // wave_size), 1)
    yield Launch("rope_store", "rope_store", grid, threads, a)


def _attention(a: AttentionArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    """Sequences with one query, then those with many, then both results put together."""
    if a.head_dim % 8 or a.value_dim % 8:
        raise DeviceError(
            f"attention: heads of {a.head_dim} and {a.value_dim} elements must be multiples of 8"
        )
    if a.max_sequences < 1:
        raise DeviceError(f"attention: a step must have at least 1 sequence, not {a.max_sequences}")
    heads_per_kv = a.n_heads // a.n_kv_heads
    macros = (("HEAD_DIM", a.head_dim), ("VALUE_DIM", a.value_dim), ("HEADS_PER_KV", heads_per_kv))

    sequences = min(rows, a.max_sequences)
    groups = a.n_kv_heads * _groups(heads_per_kv, _ATTENTION["HEADS_PER_GROUP"])
    partitions = _groups(a.table_width * a.block_size, PARTITION)
    own = AttentionArguments.from_buffer_copy(a)
    own.splits = max(1, min(partitions, _MAX_SPLITS, _SPLIT_GROUPS // (sequences * groups)))

    def launch(kernel: str, threads: int, *grid: int) -> Launch:
        return Launch("attention", kernel, (*grid, 1, 1)[:3], threads, own, macros)  # type: ignore[arg-type]

    yield launch("attention_vector", _ATTENTION["VECTOR_THREADS"], sequences, groups, own.splits)
    threads = _ATTENTION["ATTENTION_THREADS"]
    if rows > 1:
        # Each run of at least two queries is a sequence's, and makes one tile that may not be full.
        queries = 16 * threads // wave_size
        tiles = min(rows // 2, rows // queries + sequences)
        yield launch("attention_tile", threads, tiles, a.n_heads)
    columns = _groups(a.n_heads * a.value_dim, threads)
    yield launch("attention_combine", threads, rows, columns)


def _sample(a: SampleArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("sample", "sample", (rows, 1, 1), _SAMPLE["SAMPLE_THREADS"], a, overlaps=False)


_OPERATIONS: dict[str, Callable[..., Iterable[Launch]]] = {
    "set_tables": _set_tables,
    "embed": _embed,
    "rms_norm": _rms_norm,
    "matmul": _matmul,
    "swiglu": _swiglu,
    "rope_store": _rope_store,
    "attention": _attention,
    "sample": _sample,
}


def _groups(n: int, per_group: int) -> int:
    return -(-n // per_group)


def _weight_type(matrix: Matrix) -> tuple[tuple[str, int], ...]:
    if matrix.type not in _TYPES:
        known = ", ".join(quant_type.name for quant_type in _TYPES.values())
        raise DeviceError(
            f"GPUs have no kernel for weights of type {_type_name(matrix.type)}; known are {known}"
        )
    return (("WEIGHT_TYPE", matrix.type),)


def _type_name(ggml_id: int) -> str:
    return next((t.name for t in QuantType if t.ggml_id == ggml_id), f"number {ggml_id}")


class Compiler(Protocol):
    """What a kernel set needs of a GPU's runtime.

    Attributes:
        target: all that decides an image besides source and options: architecture, compiler, runtime.
    """

    target: str

    def compile(self, source: Path, options: list[str]) -> bytes:
        """The image of a translation unit; several threads may call. Raises DeviceError with the log."""
        ...

    def load(self, image: bytes) -> Any:
        """A module with the kernels of an image."""
        ...

    def function(self, module: Any, name: str) -> Any:
        """A kernel of a module."""
        ...


class KernelSet:
    """The functions of one GPU, compiled or read from the cache when they are first asked for."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._root = source_root()
        self._modules: dict[_Unit, Any] = {}
        self._functions: dict[tuple[_Unit, str], Any] = {}

    def prepare(self, wanted: Iterable[Launch]) -> None:
        """Compile what these launches need, several at a time, and load it.

        Raises:
            DeviceError: it does not compile or cannot be loaded.
        """
        units = [unit for unit in {launch.unit for launch in wanted} if unit not in self._modules]
        if not units:
            return
        with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
            for unit, image in zip(units, pool.map(self._image, units), strict=True):
                self._modules[unit] = self._compiler.load(image)

    def function(self, launch: Launch) -> Any:
        """The function of a launch, in the compiler's own type.

        Raises:
            DeviceError: it does not compile or cannot be loaded.
        """
        key = (launch.unit, launch.kernel)
        if key not in self._functions:
            self.prepare([launch])
            self._functions[key] = self._compiler.function(self._modules[launch.unit], launch.kernel)
        return self._functions[key]

    def is_cached(self, launch: Launch) -> bool:
        """Whether the cache on disk has the image of a launch."""
        return read_image(self._key(launch.unit)) is not None

    def _image(self, unit: _Unit) -> bytes:
        key = self._key(unit)
        image = read_image(key)
        if image is None:
            source = self._root / "hip" / _file(unit)
            image = self._compiler.compile(source, [*_options(unit), f"-I{self._root}"])
            write_image(key, image)
        return image

    def _key(self, unit: _Unit) -> str:
        return image_key(self._root, _file(unit), _options(unit), self._compiler.target)


def _file(unit: _Unit) -> str:
    return f"{unit[0]}.hip"


def _options(unit: _Unit) -> list[str]:
    return ["-std=c++17", *(f"-D{name}={value}" for name, value in unit[1])]
