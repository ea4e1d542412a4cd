"""Where a step's inputs lie: one host buffer that mirrors one device buffer, filled and copied once a step.

Every input keeps its address from step to step, because recorded graphs hold addresses. Those whose size
varies most, block tables and adjustments, come last, so that a step copies no more than it uses.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from redshard.worker.device.arguments import MAX_TOP_LOGPROBS, Step
from redshard.worker.memory.kv_cache import DEFAULT_BLOCK_SIZE, KVCache, sequence_rows
from redshard.worker.memory.packing import align_up
from redshard.worker.model.step_batch import ADJUSTMENT_DTYPE, SAMPLING_ROW_DTYPE, StepBatch

_ALIGNMENT = 64
#: Logit biases a row may have besides an adjustment for every token it has seen (OpenAI's API allows 300).
_BIASES_PER_ROW = 300


_DIMENSIONS = {"token_ids": 1, "positions": 1, "query_starts": 1, "block_tables": 2, "output_rows": 1}


class BatchError(ValueError):
    """A step batch that a stage cannot run: says which field, which value and which limit."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step a stage is built for.

    Attributes:
        max_tokens: rows of one step.
        max_sequences: sequences of one step.
        max_outputs: rows of one step whose logits or next tokens are wanted.
        max_context: positions of one sequence.
        n_kv_blocks: blocks of the key/value cache.
        block_size: tokens of a block.
    """

    max_tokens: int
    max_sequences: int
    max_outputs: int
    max_context: int
    n_kv_blocks: int
    block_size: int = DEFAULT_BLOCK_SIZE

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")

    @property
    def table_width(self) -> int:
        """Blocks that a sequence of `max_context` positions takes."""
        return -(-self.max_context // self.block_size)

    @property
    def max_adjustments(self) -> int:
        """Adjustments of one step: one for every token in the cache, and each row's biases."""
        return self.n_kv_blocks * self.block_size + _BIASES_PER_ROW * self.max_outputs


@dataclass(frozen=True, slots=True)
class InputAddresses:
    """Device addresses of a step's inputs, as the argument blocks name them."""

    step: int
    token_ids: int
    positions: int
    slots: int
    sequences: int
    query_starts: int
    output_rows: int
    sampling: int
    block_tables: int
    adjustments: int


class InputLayout:
    """Offsets of a step's inputs in a buffer of `nbytes` bytes, the same on the host and on the device."""

    def __init__(self, limits: StepLimits) -> None:
        self.limits = limits
        self.nbytes = 0
        self.offsets: dict[str, int] = {}
        self._add("step", ctypes.sizeof(Step))
        for name in ("token_ids", "positions", "slots", "sequences"):
            self._add(name, 4 * limits.max_tokens)
        self._add("query_starts", 4 * (limits.max_sequences + 1))
        self._add("output_rows", 4 * limits.max_outputs)
        self._add("sampling", SAMPLING_ROW_DTYPE.itemsize * limits.max_outputs)
        # Adjustments follow the block tables that a step has, wherever those end: the tables' address is
        # their base too, and the sampling rows' indices are shifted. Hence one unit of alignment to spare.
        tables = 4 * limits.max_sequences * limits.table_width
        self._add("tail", tables + _ALIGNMENT + ADJUSTMENT_DTYPE.itemsize * limits.max_adjustments)

    def addresses(self, base: int) -> InputAddresses:
        """The inputs' addresses in a device buffer at `base`."""
        at = {name: base + offset for name, offset in self.offsets.items()}
        tail = at.pop("tail")
        return InputAddresses(**at, block_tables=tail, adjustments=tail)

    def view(self, array: np.ndarray, name: str, count: int, dtype: np.dtype | type = np.int32) -> np.ndarray:
        """The first `count` elements of one input in a host buffer."""
        start = self.offsets[name]
        return array[start : start + count * np.dtype(dtype).itemsize].view(dtype)

    def _add(self, name: str, nbytes: int) -> None:
        self.offsets[name] = self.nbytes
        self.nbytes += align_up(nbytes, _ALIGNMENT)


class StepInputs:
    """Checks a batch and lays it out in host memory as the device will see it.

    Args:
        layout: of the inputs.
        array: the host buffer, uint8 (layout.nbytes,).
        n_vocab: token ids are below it.
        cache: finds the tokens' slots; None for a stage without layers, which needs none.
    """

    def __init__(self, layout: InputLayout, array: np.ndarray, n_vocab: int, cache: KVCache | None) -> None:
        limits = layout.limits
        self.limits = limits
        self._array, self._n_vocab, self._cache = array, n_vocab, cache
        self._tail = layout.offsets["tail"]
        self._step = layout.view(array, "step", 4)
        self._token_ids = layout.view(array, "token_ids", limits.max_tokens)
        self._positions = layout.view(array, "positions", limits.max_tokens)
        self._slots = layout.view(array, "slots", limits.max_tokens)
        self._sequences = layout.view(array, "sequences", limits.max_tokens)
        self._query_starts = layout.view(array, "query_starts", limits.max_sequences + 1)
        self._output_rows = layout.view(array, "output_rows", limits.max_outputs)
        self._sampling = layout.view(array, "sampling", limits.max_outputs, SAMPLING_ROW_DTYPE)
        tables = layout.view(array, "tail", limits.max_sequences * limits.table_width)
        self._tables = tables.reshape(limits.max_sequences, limits.table_width)

    def pack(self, batch: StepBatch, is_last: bool) -> int:
        """Check a batch and lay it out in the host buffer.

        Args:
            batch: the step.
            is_last: the stage samples, so the sampling rows and adjustments are wanted too.

        Returns:
            How many bytes from the start of the buffer the device needs.

        Raises:
            BatchError: the batch contradicts itself or exceeds a limit; the buffer then holds nothing of use.
        """
        n_tokens, n_sequences, n_outputs = self._check_sizes(batch)
        _check_range("token_ids", batch.token_ids, self._n_vocab)
        _check_range("positions", batch.positions, self.limits.max_context)
        _check_range("output_rows", batch.output_rows, n_tokens)
        try:
            sequences = sequence_rows(batch.query_starts, n_tokens)
            if self._cache is not None:
                self._slots[:n_tokens] = self._cache.slots(
                    batch.block_tables, batch.positions, batch.query_starts
                )
        except ValueError as error:
            raise BatchError(f"step {batch.step_id}: {error}") from None
        self._check_sequences(batch, sequences)

        self._step[:3] = n_tokens, n_sequences, n_outputs
        self._token_ids[:n_tokens] = batch.token_ids
        self._positions[:n_tokens] = batch.positions
        self._sequences[:n_tokens] = sequences
        self._query_starts[: n_sequences + 1] = batch.query_starts
        self._output_rows[:n_outputs] = batch.output_rows
        self._tables[:n_sequences, : batch.block_tables.shape[1]] = batch.block_tables
        used = self._tail + 4 * n_sequences * self.limits.table_width
        return self._pack_sampling(batch, used) if is_last and not batch.return_logits else used

    def _check_sizes(self, batch: StepBatch) -> tuple[int, int, int]:
        limits = self.limits
        for name, ndim in _DIMENSIONS.items():
            array = getattr(batch, name)
            if array.dtype != np.int32 or array.ndim != ndim:
                raise BatchError(
                    f"step {batch.step_id}: {name} is {array.dtype} of shape {array.shape}, "
                    f"but must be int32 of {ndim} dimensions"
                )
        n_tokens, n_sequences = len(batch.token_ids), len(batch.query_starts) - 1
        n_outputs = len(batch.output_rows)
        for what, count, least, most in (
            ("tokens", n_tokens, 1, limits.max_tokens),
            ("sequences", n_sequences, 1, limits.max_sequences),
            ("output rows", n_outputs, 0, limits.max_outputs),
            ("columns of block_tables", batch.block_tables.shape[-1], 1, limits.table_width),
            ("most probable tokens", batch.n_top, 0, MAX_TOP_LOGPROBS),
        ):
            if not least <= count <= most:
                raise BatchError(
                    f"step {batch.step_id} has {count} {what}, but {least} to {most} are possible here"
                )
        for what, count, expected in (
            ("positions", len(batch.positions), n_tokens),
            ("rows of block_tables", len(batch.block_tables), n_sequences),
        ):
            if count != expected:
                raise BatchError(f"step {batch.step_id} has {count} {what}, but needs {expected}")
        return n_tokens, n_sequences, n_outputs

    def _check_sequences(self, batch: StepBatch, sequences: np.ndarray) -> None:
        """Attention reads every block up to a sequence's last position, not only those of its new tokens."""
        if (batch.query_starts[1:] == batch.query_starts[:-1]).any():
            raise BatchError(f"step {batch.step_id}: each sequence must have at least one token")
        positions = batch.positions
        same_sequence = sequences[1:] == sequences[:-1]
        if ((positions[1:] - positions[:-1] != 1) & same_sequence).any():
            raise BatchError(f"step {batch.step_id}: the positions of a sequence must follow one another")
        last_blocks = positions[batch.query_starts[1:] - 1] // self.limits.block_size
        tables = batch.block_tables
        used = np.arange(tables.shape[1]) <= last_blocks[:, None]
        if ((tables.view(np.uint32) >= self.limits.n_kv_blocks) & used).any():
            raise BatchError(
                f"step {batch.step_id}: block_tables must hold block numbers from 0 to "
                f"{self.limits.n_kv_blocks - 1}"
            )

    def _pack_sampling(self, batch: StepBatch, used: int) -> int:
        """Lay the sampling rows out, and the adjustments from `used` on; returns the new end."""
        n_outputs, n_adjustments = len(batch.output_rows), len(batch.adjustments)
        if len(batch.sampling) != n_outputs:
            raise BatchError(
                f"step {batch.step_id} has {len(batch.sampling)} sampling rows for {n_outputs} output rows"
            )
        if n_adjustments > self.limits.max_adjustments:
            raise BatchError(
                f"step {batch.step_id} has {n_adjustments} adjustments, but at most "
                f"{self.limits.max_adjustments} are possible here"
            )
        rows = self._sampling[:n_outputs]
        rows[:] = batch.sampling
        if not (n_outputs and n_adjustments):
            rows["first_adjustment"] = rows["end_adjustment"] = 0
            return used
        _check_range("adjustments' tokens", batch.adjustments["token"], self._n_vocab)
        first, end = rows["first_adjustment"], rows["end_adjustment"]
        if first.min() < 0 or (end < first).any() or end.max() > n_adjustments:
            raise BatchError(f"sampling rows must name adjustments from 0 to {n_adjustments}")
        entry = ADJUSTMENT_DTYPE.itemsize
        shift = -(-(used - self._tail) // entry)
        first += shift
        end += shift
        begin = self._tail + shift * entry
        used = begin + n_adjustments * entry
        self._array[begin:used].view(ADJUSTMENT_DTYPE)[:] = batch.adjustments
        return used


def _check_range(what: str, values: np.ndarray, end: int) -> None:
    # As unsigned numbers, negative ones are too large as well.
    if len(values) and values.view(np.uint32).max() >= end:
        raise BatchError(
            f"{what} must lie between 0 and {end - 1}, but range from {values.min()} to {values.max()}"
        )
