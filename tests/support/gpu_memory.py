"""Arrays on a GPU for tests of single operations: inputs are copied in, outputs are poisoned and guarded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from support.reference_ops import Quantized

from redshard.loader.gguf.quant_types import QuantType
from redshard.worker.device.arguments import Activation, Matrix, Step
from redshard.worker.device.base import BlockRun, Device

_ALIGNMENT = 256
_GUARD = 256
_NBYTES = 16 << 20
_POISON = 0xFF  # NaN as float, -1 as int


@dataclass(frozen=True)
class Room:
    """An output on the GPU: `guard` bytes behind it must stay as they are."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class ActivationRoom:
    """An activation to be written, float32 and in blocks, or one of them."""

    values: Room | None
    quants: Room | None
    scales: Room | None
    sums: Room | None

    def argument(self) -> Activation:
        parts = (self.values, self.quants, self.scales, self.sums)
        return Activation(*(part.address if part else 0 for part in parts))


class GpuMemory:
    """One allocation, handed out piece by piece; `clear` starts anew."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._base = device.allocate(_NBYTES)
        self._host = device.allocate_host(_NBYTES)
        self._staging = device.allocate(device.block_staging_bytes)
        self._top = 0

    def clear(self) -> None:
        self._top = 0

    def put(self, array: np.ndarray) -> int:
        """Address of a copy of an array."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self._take(max(1, data.nbytes))
        self._host.array[: data.nbytes] = data
        self.device.copy_in(address, self._host, data.nbytes)
        self.device.synchronize()
        return address

    def put_optional(self, array: np.ndarray | None) -> int:
        return 0 if array is None else self.put(array)

    def put_step(self, n_tokens: int, n_sequences: int = 1, n_outputs: int = 0, *, n_changes: int = 0) -> int:
        return self.put(np.frombuffer(bytes(Step(n_tokens, n_sequences, n_outputs, n_changes)), np.uint8))

    def put_matrix(self, blocks: np.ndarray, quant_type: QuantType, bias: np.ndarray | None = None) -> Matrix:
        """A matrix of GGUF blocks, uint8 (rows, bytes of a row), uploaded in two runs as a worker would."""
        data = blocks.reshape(-1)
        address = self._take(data.nbytes)
        self._host.array[: data.nbytes] = data
        middle = len(data) // quant_type.block_bytes // 3 * quant_type.block_bytes
        for start, end in ((0, middle), (middle, len(data))):
            run = BlockRun(quant_type, data.nbytes, start, end - start)
            self.device.copy_in_blocks(address, self._host, start, run, self._staging)
        self.device.synchronize()
        return Matrix(address, self.put_optional(bias), quant_type.ggml_id, len(blocks))

    def put_activation(self, values: np.ndarray | None, quantized: Quantized | None) -> Activation:
        parts = (quantized.quants, quantized.scales, quantized.sums) if quantized else (None, None, None)
        return Activation(*(self.put_optional(part) for part in (values, *parts)))

    def room(self, shape: tuple[int, ...], dtype: type = np.float32) -> Room:
        room = Room(0, shape, np.dtype(dtype))
        address = self._take(room.nbytes)
        self.device.fill(address, _POISON, room.nbytes + _GUARD)
        return Room(address, shape, room.dtype)

    def room_holding(self, array: np.ndarray) -> Room:
        """An output that starts with these values."""
        room = self.room(array.shape, array.dtype.type)
        self._host.array[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.device.copy_in(room.address, self._host, array.nbytes)
        self.device.synchronize()
        return room

    def room_for_activation(self, rows: int, width: int, form: str) -> ActivationRoom:
        values = self.room((rows, width)) if form in ("both", "values") else None
        if form == "values":
            return ActivationRoom(values, None, None, None)
        blocks = (rows, width // 32)
        return ActivationRoom(values, self.room((rows, width), np.int8), self.room(blocks), self.room(blocks))

    def read(self, room: Room) -> np.ndarray:
        """What was written; fails if something was written behind it."""
        self.device.copy_out(self._host, room.address, room.nbytes + _GUARD)
        self.device.synchronize()
        data = self._host.array[: room.nbytes + _GUARD]
        assert (data[room.nbytes :] == _POISON).all(), "written behind the output"
        return data[: room.nbytes].view(room.dtype).reshape(room.shape).copy()

    def read_rows(self, room: Room, rows: int) -> np.ndarray:
        """The first rows; fails if others were written."""
        array = self.read(room)
        spare = np.ascontiguousarray(array[rows:]).view(np.uint8)
        assert (spare == _POISON).all(), "written to rows that the step does not have"
        return array[:rows]

    def read_quantized(self, out: ActivationRoom, rows: int) -> Quantized:
        parts = [part for part in (out.quants, out.scales, out.sums) if part]
        return Quantized(*(self.read_rows(part, rows) for part in parts))

    def _take(self, nbytes: int) -> int:
        address = self._base + self._top
        self._top += -(-(nbytes + _GUARD) // _ALIGNMENT) * _ALIGNMENT
        assert self._top <= _NBYTES, "this test needs more memory than the helper has"
        return address
