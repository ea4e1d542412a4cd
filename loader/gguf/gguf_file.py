"""Open, validate and map a GGUF file or a split set of them.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Opening walks the whole header once
without decoding it, so a broken file is refused at once and a large vocabulary costs milliseconds; metadata
values are decoded when asked for, and tensors are views of the mapped file. A file that is cut short after it
was opened cannot be guarded against: touching a mapped page past its end ends the process (SIGBUS).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from redshard.loader.gguf.quant_types import QuantType

MetadataValue = int | float | bool | str | list[str] | np.ndarray

# No real file comes near these; they keep an absurd one from taking minutes or gigabytes.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = (1 << 16) - 1
MAX_ARRAY_STRINGS = 1 << 24
MAX_DIMENSIONS = 4

# What `fingerprint` reads of a file's tensors.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GGUFError(ValueError):
    """A GGUF file that cannot be used; the message names the file, the reason and the byte offset if any."""

    def __init__(self, path: Path | str, reason: str, offset: int | None = None) -> None:
        super().__init__(path, reason, offset)
        self.path = Path(path)
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (at byte {self.offset})"
        return f"{self.path}: {self.reason}{where}"


class _ValueType(IntEnum):
    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES: dict[int, np.dtype] = {
    _ValueType.UINT8: np.dtype("<u1"),
    _ValueType.INT8: np.dtype("<i1"),
    _ValueType.UINT16: np.dtype("<u2"),
    _ValueType.INT16: np.dtype("<i2"),
    _ValueType.UINT32: np.dtype("<u4"),
    _ValueType.INT32: np.dtype("<i4"),
    _ValueType.FLOAT32: np.dtype("<f4"),
    _ValueType.BOOL: np.dtype("?"),
    _ValueType.UINT64: np.dtype("<u8"),
    _ValueType.INT64: np.dtype("<i8"),
    _ValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: as in the file.
        type: element format.
        shape: numpy order, (rows, columns) for a matrix: the reverse of the order in the file.
        nbytes: size of the stored blocks.
        path: the file that holds it.
        offset: of the first byte, from the start of that file.
    """

    name: str
    type: QuantType
    shape: tuple[int, ...]
    nbytes: int
    path: Path
    offset: int


class _StoredValue(NamedTuple):
    """An undecoded metadata value: `length` is None for a scalar, `offset` that of its first element."""

    element_type: _ValueType
    length: int | None
    offset: int


class _Cursor:
    """Reads little-endian fields one after the other, never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def error(self, reason: str, offset: int | None = None) -> GGUFError:
        return GGUFError(self.path, reason, self.position if offset is None else offset)

    def skip(self, nbytes: int, what: str) -> None:
        if nbytes > self.left:
            raise self.error(f"file is truncated: {what} takes {nbytes} bytes, {self.left} are left")
        self.position += nbytes

    def _unsigned(self, layout: struct.Struct, what: str) -> int:
        start = self.position
        self.skip(layout.size, what)
        return int(layout.unpack_from(self.data, start)[0])

    def u32(self, what: str) -> int:
        return self._unsigned(_U32, what)

    def u64(self, what: str) -> int:
        return self._unsigned(_U64, what)

    def count(self, what: str, limit: int, least_bytes: int) -> int:
        """A number of things of at least `least_bytes` each, all of which must fit into what is left."""
        start = self.position
        count = self.u64(f"the number of {what}")
        if count * least_bytes > self.left:
            raise self.error(f"{count} {what} cannot fit into the {self.left} bytes left", start)
        if count > limit:
            raise self.error(f"{count} {what} are more than the {limit} this reader accepts", start)
        return count

    def name(self, what: str) -> str:
        start = self.position
        length = self.u64(f"the length of {what}")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.error(f"{what} has {length} bytes, not 1 to {MAX_NAME_BYTES}", start)
        self.skip(length, what)
        try:
            return self.data[start + _U64.size : self.position].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8", start) from None

    def skip_strings(self, count: int, what: str) -> None:
        # The hot loop of opening a file: a vocabulary has hundreds of thousands of strings.
        data, position, last = self.data, self.position, len(self.data) - _U64.size
        length_at = _U64.unpack_from
        for index in range(count):
            if position > last:
                raise self.error(f"file is truncated in string {index} of {what}, which has {count}")
            position += _U64.size + length_at(data, position)[0]
        if position > len(data):
            raise self.error(f"file is truncated in the last string of {what}")
        self.position = position


class _Metadata(Mapping[str, MetadataValue]):
    """Key to value; a value is decoded when it is first asked for."""

    def __init__(self, data: mmap.mmap, stored: dict[str, _StoredValue]) -> None:
        self._data = data
        self._stored = stored
        self._decoded: dict[str, MetadataValue] = {}

    def __getitem__(self, key: str) -> MetadataValue:
        if key not in self._decoded:
            self._decoded[key] = self._decode(self._stored[key])
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _decode(self, value: _StoredValue) -> MetadataValue:
        count = 1 if value.length is None else value.length
        if value.element_type is _ValueType.STRING:
            strings = self._strings(value.offset, count)
            return strings[0] if value.length is None else strings
        dtype = _DTYPES[value.element_type]
        raw = self._data[value.offset : value.offset + count * dtype.itemsize]
        elements = np.frombuffer(raw, np.uint8) != 0 if dtype == np.bool_ else np.frombuffer(raw, dtype)
        return elements[0].item() if value.length is None else elements

    def _strings(self, position: int, count: int) -> list[str]:
        data, length_at, width = self._data, _U64.unpack_from, _U64.size
        strings = []
        for _ in range(count):
            start = position + width
            position = start + length_at(data, position)[0]
            strings.append(data[start:position].decode(errors="replace"))
        return strings


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    version: int
    data: mmap.mmap
    metadata: _Metadata
    tensors: list[TensorInfo]

    def split_key(self, name: str, default: int) -> int:
        key = f"split.{name}"
        value = self.metadata.get(key, default)
        if not isinstance(value, int):
            raise GGUFError(self.path, f"{key} must be an integer, found {value!r}")
        return value


class GGUFFile:
    """A GGUF model: metadata and a directory of tensors over one file or a whole split set.

    Use as a context manager. Tensor views stay valid after closing; each keeps its file mapped.

    Attributes:
        path: the file opened, of a split set the first one.
        paths: all files of the set, in order.
        version: GGUF version, 2 or 3.
        metadata: key to int, float, bool, str, list of str, or numpy array (other arrays). A split set has
            that of its first file. Bytes of a string value that are not UTF-8 read as U+FFFD.
        tensors: name to `TensorInfo`, in file order.
    """

    def __init__(self, shards: list[_Shard]) -> None:
        self.path = shards[0].path
        self.paths = [shard.path for shard in shards]
        self.version = shards[0].version
        self.metadata: Mapping[str, MetadataValue] = shards[0].metadata
        self.tensors: Mapping[str, TensorInfo] = _merge_tensors(shards)
        self._data = {shard.path: shard.data for shard in shards}

    @classmethod
    def open(cls, path: Path | str) -> GGUFFile:
        """Open a file, or the whole split set that any one of its files belongs to.

        Raises:
            GGUFError: the file, or one of the set, is missing or breaks the format.
        """
        given = _read_shard(Path(path))
        return cls([given] if given.split_key("count", 1) <= 1 else _read_split_set(given))

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files; no further `tensor_bytes`."""
        self._data = {}

    def fingerprint(self) -> str:
        """Tells this model from any other, also from one with the same shapes, wherever its files lie.

        A digest of the sizes, of all that comes before the tensors, and of samples spread over them.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path, data in self._data.items():
            start = min(
                (info.offset for info in self.tensors.values() if info.path == path), default=len(data)
            )
            digest.update(_U64.pack(len(data)) + data[:start])
            step = max(_SAMPLE_BYTES, (len(data) - start) // _SAMPLES)
            for offset in range(start, len(data), step):
                digest.update(data[offset : offset + _SAMPLE_BYTES])
        return digest.hexdigest()

    def tensor_bytes(self, name: str) -> np.ndarray:
        """The stored blocks of a tensor: a read-only uint8 view (nbytes,) of the mapped file, not a copy.

        Raises:
            GGUFError: there is no such tensor, or the file was closed.
        """
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(self.path, f"there is no tensor {name!r}")
        if info.path not in self._data:
            raise GGUFError(self.path, f"tensor {name!r} was asked for after the file was closed")
        return np.frombuffer(self._data[info.path], np.uint8, count=info.nbytes, offset=info.offset)


def _map_file(path: Path) -> mmap.mmap:
    try:
        # Opening a FIFO would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise GGUFError(path, "is not a regular file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise GGUFError(path, "file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GGUFError(path, f"cannot be opened: {error.strerror or error}") from error


def _read_shard(path: Path) -> _Shard:
    cursor = _Cursor(path, _map_file(path))
    version = _read_version(cursor)
    n_tensors = cursor.count("tensors", MAX_TENSORS, least_bytes=25)
    n_keys = cursor.count("metadata keys", MAX_KEYS, least_bytes=14)
    metadata = _Metadata(cursor.data, _read_keys(cursor, n_keys))
    alignment = _alignment(cursor, metadata)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    return _Shard(path, version, cursor.data, metadata, tensors)


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.data[:4]
    cursor.skip(4, "the magic")
    if magic != b"GGUF":
        raise cursor.error(f"not a GGUF file: it begins with {magic!r}", 0)
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise cursor.error("big-endian GGUF files are not supported", 4)
        raise cursor.error(f"GGUF version {version} is not supported, only {_VERSIONS} are", 4)
    return version


def _read_keys(cursor: _Cursor, count: int) -> dict[str, _StoredValue]:
    stored: dict[str, _StoredValue] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.name(f"metadata key {index}")
        if key in stored:
            raise cursor.error(f"duplicate metadata key {key!r}", start)
        stored[key] = _read_value(cursor, key)
    return stored


def _read_value(cursor: _Cursor, key: str) -> _StoredValue:
    what = f"the value of {key!r}"
    value_type = _read_value_type(cursor, what)
    length: int | None = None
    if value_type is _ValueType.ARRAY:
        value_type = _read_value_type(cursor, what)
        if value_type is _ValueType.ARRAY:
            raise cursor.error(f"{what} is an array of arrays, which is not supported")
        if value_type is _ValueType.STRING:
            length = cursor.count(f"strings in {what}", MAX_ARRAY_STRINGS, _U64.size)
        else:
            length = cursor.count(f"elements in {what}", len(cursor.data), _DTYPES[value_type].itemsize)
    stored = _StoredValue(value_type, length, cursor.position)
    count = 1 if length is None else length
    if value_type is _ValueType.STRING:
        cursor.skip_strings(count, what)
    else:
        cursor.skip(_DTYPES[value_type].itemsize * count, what)
    return stored


def _read_value_type(cursor: _Cursor, what: str) -> _ValueType:
    start = cursor.position
    number = cursor.u32(f"the type of {what}")
    try:
        return _ValueType(number)
    except ValueError:
        raise cursor.error(f"{what} has the unknown type {number}", start) from None


def _alignment(cursor: _Cursor, metadata: _Metadata) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment must be a power of two of at least 8, found {alignment!r}", 0)
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> list[TensorInfo]:
    """The tensor directory, with offsets from the start of the file."""
    entries = [_read_tensor(cursor, index, alignment) for index in range(count)]
    data_start = math.ceil(cursor.position / alignment) * alignment
    tensors = [replace(entry, offset=data_start + entry.offset) for entry in entries]
    _check_tensors(cursor, tensors)
    return tensors


def _read_tensor(cursor: _Cursor, index: int, alignment: int) -> TensorInfo:
    """One entry of the directory, its offset still counted from the start of the data section."""
    start = cursor.position
    name = cursor.name(f"the name of tensor {index}")
    n_dimensions = cursor.u32(f"the number of dimensions of tensor {name!r}")
    if n_dimensions > MAX_DIMENSIONS:
        raise cursor.error(
            f"tensor {name!r} has {n_dimensions} dimensions, not at most {MAX_DIMENSIONS}", start
        )
    dimensions = [cursor.u64(f"a dimension of tensor {name!r}") for _ in range(n_dimensions)]
    if 0 in dimensions:
        raise cursor.error(f"tensor {name!r} of dimensions {dimensions} has no elements", start)
    shape = tuple(reversed(dimensions))
    type_id = cursor.u32(f"the type of tensor {name!r}")
    try:
        quant_type = QuantType.from_id(type_id)
        nbytes = quant_type.nbytes(shape)
    except ValueError as error:
        raise cursor.error(f"tensor {name!r}: {error}", start) from None
    offset = cursor.u64(f"the offset of tensor {name!r}")
    if max(math.prod(dimensions), nbytes) >= 1 << 63:
        raise cursor.error(f"tensor {name!r}: dimensions {dimensions} overflow 63 bits", start)
    if offset % alignment:
        raise cursor.error(f"tensor {name!r}: offset {offset} is not aligned to {alignment} bytes", start)
    return TensorInfo(name, quant_type, shape, nbytes, cursor.path, offset)


def _check_tensors(cursor: _Cursor, tensors: list[TensorInfo]) -> None:
    """Every tensor lies inside the file, and no two share a byte."""
    previous: TensorInfo | None = None
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise cursor.error(f"tensors {previous.name!r} and {tensor.name!r} overlap", tensor.offset)
        if tensor.offset + tensor.nbytes > len(cursor.data):
            raise cursor.error(
                f"tensor {tensor.name!r} of {tensor.nbytes} bytes ends past the end of the file, "
                f"which has {len(cursor.data)} bytes",
                tensor.offset,
            )
        previous = tensor


def _read_split_set(given: _Shard) -> list[_Shard]:
    """All files of the set that `given` belongs to, in order."""
    count, number = given.split_key("count", 1), given.split_key("no", -1)
    match = _SHARD_NAME.fullmatch(given.path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise GGUFError(
            given.path,
            f"holds part {number + 1} of {count} of a split set, so its name must end in "
            f"-{number + 1:05d}-of-{count:05d}.gguf",
        )
    names = [f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    paths = [given.path.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise GGUFError(given.path, f"{len(missing)} of {count} files of the split set are missing: {listed}")
    shards = [given if path == given.path else _read_shard(path) for path in paths]
    for index, shard in enumerate(shards):
        found = shard.split_key("no", -1), shard.split_key("count", -1)
        if found != (index, count):
            raise GGUFError(
                shard.path, f"is part {found[0] + 1} of {found[1]}, expected part {index + 1} of {count}"
            )
    n_tensors = sum(len(shard.tensors) for shard in shards)
    if shards[0].split_key("tensors.count", n_tensors) != n_tensors:
        expected = shards[0].split_key("tensors.count", n_tensors)
        raise GGUFError(shards[0].path, f"the split set should hold {expected} tensors, found {n_tensors}")
    return shards


def _merge_tensors(shards: list[_Shard]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in merged:
                raise GGUFError(shard.path, f"duplicate tensor {tensor.name!r}", tensor.offset)
            merged[tensor.name] = tensor
    return merged
