"""The kernels of ``kernels/hip`` for one GPU: which launches make an operation, and the functions they need.

Grids and workgroups here and in the kernels belong together; the constants below name those in the sources.
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
from redshard.worker.device.kernel_images import image_key, read_image, source_root, write_image
from redshard.worker.device.support import GPU_WEIGHT_TYPES

#: Row counts that `matmul_vector` and `swiglu_vector` are compiled for; other counts take the tile kernels.
#: Tiles would be faster from 8 rows on, but add up in another order: so a row of a step of up to 8 tokens
#: gets the numbers that it gets alone.
VECTOR_ROWS = (1, 2, 4, 8)
#: Rows up to which launches overlap: longer ones only get in each other's way.
_OVERLAPPING_ROWS = 64
#: A tile that makes fewer workgroups gives way to smaller ones, which leave less of a GPU idle. Found on 132
#: compute units; that every kernel does the same on every GPU is worth more than the last few percent.
FULL_GRID = 96

_ROW_THREADS = 1024  # rows.hip
_TABLES_THREADS = 1024  # tables.hip
_ROPE_THREADS, _ROPE_ELEMENTS_PER_LANE = 256, 8  # rope_store.hip
_VECTOR_THREADS, _WEIGHT_ROWS_PER_WAVE = 128, 2  # matmul_vector.hip
_SWIGLU_THREADS, _SWIGLU_ROWS = 256, 32
_FLOAT_TILE_THREADS = 256  # matmul_tile_float.hip
_ATTENTION_THREADS, _ATTENTION_VECTOR_THREADS = 128, 256  # attention.hip
_HEADS_PER_GROUP = 4
_MAX_SPLITS, _SPLIT_GROUPS = 8, 1024  # a context is split until there are so many workgroups
_PLANES_THREADS, _PLANES_GROUPS = 256, 1024  # planes.hip
_SAMPLE_THREADS = 1024  # sample.hip


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


#: Tiles of matmul_tile.hip and of matmul_tile_float.hip, by the rows of activations that they are for.
TILES = {
    ("matmul", "matmul_tile"): (Tile(16, 16, 8), Tile(32, 32, 8), Tile(64, 32, 8), Tile(128, 128, 8)),
    ("swiglu", "matmul_tile"): (Tile(16, 32, 4), Tile(32, 32, 4), Tile(64, 32, 4), Tile(128, 64, 8)),
    ("matmul", "matmul_tile_float"): (Tile(32, 64), Tile(64, 64)),
    ("swiglu", "matmul_tile_float"): (Tile(32, 64), Tile(64, 32)),
}

_TYPES = {quant_type.ggml_id: quant_type for quant_type in GPU_WEIGHT_TYPES}
_FLOAT_TYPES = {quant_type.ggml_id for quant_type in GPU_WEIGHT_TYPES if quant_type.block_elements == 1}

#: Fields (offset, bytes) of a block in the order of the planes that kernels/hip/formats.h reads.
PLANES: dict[QuantType, tuple[tuple[int, int], ...]] = {
    QuantType.Q4_0: ((2, 16), (0, 2)),
    QuantType.Q8_0: ((2, 32), (0, 2)),
    QuantType.Q6_K: ((0, 128), (128, 64), (192, 16), (208, 2)),
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


class SplitPlanesArguments(ctypes.Structure):
    """``SplitPlanesArguments`` of kernels/hip/planes.hip."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("planes", ctypes.c_void_p),
        ("first_block", ctypes.c_int64),
        ("blocks_in_all", ctypes.c_int64),
        ("n_blocks", ctypes.c_int32),
        ("block_bytes", ctypes.c_int32),
        ("n_fields", ctypes.c_int32),
        ("n_groups", ctypes.c_int32),
        ("field", ctypes.c_int32 * 2 * 4),
    ]


def launches(operation: str, arguments: ctypes.Structure, rows: int, wave_size: int) -> list[Launch]:
    """The launches that make an operation of `worker.arguments.KERNEL_ARGUMENTS`, in order.

    Args:
        operation: its name.
        arguments: its argument block.
        rows: the most rows the step may have; launches cover as many.
        wave_size: lanes of the GPU that run together.

    Raises:
        DeviceError: no such operation, or no kernel for such arguments.
    """
    try:
        plan = _PLANS[operation]
    except KeyError:
        raise DeviceError(f"launch of unknown kernel {operation!r}; known are {', '.join(_PLANS)}") from None
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
        n_groups=min(_PLANES_GROUPS, _groups(run.nbytes // 2, _PLANES_THREADS)),
    )
    for i, field in enumerate(fields):
        arguments.field[i][:] = field
    return Launch(
        "planes", "split_planes", (arguments.n_groups, 1, 1), _PLANES_THREADS, arguments, overlaps=False
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
    yield Launch("tables", "set_tables", (1, 1, 1), _TABLES_THREADS, a)


def _embed(a: EmbedArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("rows", "embed", (rows, 1, 1), _ROW_THREADS, a, _weight_type(a.table))


def _rms_norm(a: RmsNormArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("rows", "rms_norm", (rows, 1, 1), _ROW_THREADS, a)


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
            per_group = _WEIGHT_ROWS_PER_WAVE * _VECTOR_THREADS // wave_size
            grid = (sum(_groups(height, per_group) for height in heights), 1, 1)
            yield Launch("matmul_vector", f"matmul_vector_{rows}", grid, _VECTOR_THREADS, part, macros)
        else:
            yield _tile_launch("matmul", part, part.w[0], heights, rows, wave_size)


def _swiglu(a: SwigluArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    if a.gate.type != a.up.type:
        raise DeviceError(
            f"swiglu: gate is {_type_name(a.gate.type)}, up is {_type_name(a.up.type)}; "
            "GPUs have no kernel for different types"
        )
    if rows in VECTOR_ROWS:
        grid = (_groups(a.gate.n_rows, _SWIGLU_ROWS), 1, 1)
        yield Launch("matmul_vector", f"swiglu_vector_{rows}", grid, _SWIGLU_THREADS, a, _weight_type(a.gate))
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
    kernel = f"{operation}_{source.removeprefix('matmul_')}_{tile.tokens}"
    threads = tile.waves * wave_size if tile.waves else _FLOAT_TILE_THREADS
    return Launch(source, kernel, grid, threads, a, macros)


def _rope_store(a: RopeStoreArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    if a.head_dim > _ROPE_ELEMENTS_PER_LANE * wave_size:
        raise DeviceError(
            f"rope_store: heads of {a.head_dim} elements are too large; "
            f"this GPU's kernel holds {_ROPE_ELEMENTS_PER_LANE * wave_size}"
        )
    heads = a.n_heads + 2 * a.n_kv_heads
    grid = (rows, _groups(heads, _ROPE_THREADS // wave_size), 1)
    yield Launch("rope_store", "rope_store", grid, _ROPE_THREADS, a)


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
    groups = a.n_kv_heads * _groups(heads_per_kv, _HEADS_PER_GROUP)
    partitions = _groups(a.table_width * a.block_size, PARTITION)
    own = AttentionArguments.from_buffer_copy(a)
    own.splits = max(1, min(partitions, _MAX_SPLITS, _SPLIT_GROUPS // (sequences * groups)))

    def launch(kernel: str, threads: int, *grid: int) -> Launch:
        return Launch("attention", kernel, (*grid, 1, 1)[:3], threads, own, macros)  # type: ignore[arg-type]

    yield launch("attention_vector", _ATTENTION_VECTOR_THREADS, sequences, groups, own.splits)
    if rows > 1:
        # Each run of at least two queries is a sequence's, and makes one tile that may not be full.
        queries = 16 * _ATTENTION_THREADS // wave_size
        tiles = min(rows // 2, rows // queries + sequences)
        yield launch("attention_tile", _ATTENTION_THREADS, tiles, a.n_heads)
    columns = _groups(a.n_heads * a.value_dim, _ATTENTION_THREADS)
    yield launch("attention_combine", _ATTENTION_THREADS, rows, columns)


def _sample(a: SampleArguments, rows: int, wave_size: int) -> Iterable[Launch]:
    yield Launch("sample", "sample", (rows, 1, 1), _SAMPLE_THREADS, a, overlaps=False)


_PLANS: dict[str, Callable[..., Iterable[Launch]]] = {
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
