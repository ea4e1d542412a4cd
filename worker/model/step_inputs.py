"""Where a step's inputs lie: host buffers that mirror one device buffer, filled and copied once a step.

Every input keeps its address from step to step, because recorded graphs hold addresses. Those whose size
varies most, changes of block tables and adjustments, come last, so that a step copies no more than it uses.
Block tables stay on the device; `SequenceStates` knows what they hold, and keeps each sequence's adjustments.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from redshard.worker.device.arguments import MAX_TOP_LOGPROBS, PARTITION, Step, TableChange
from redshard.worker.device.base import HostBuffer
from redshard.worker.memory.kv_cache import DEFAULT_BLOCK_SIZE
from redshard.worker.memory.packing import align_up
from redshard.worker.model.step_batch import ADJUSTMENT_DTYPE, SAMPLING_ROW_DTYPE, StepBatch

_ALIGNMENT = 64
#: Logit biases a row may have besides an adjustment for every token it has seen (OpenAI's API allows 300).
_BIASES_PER_ROW = 300

_TABLE_CHANGE_DTYPE = np.dtype(TableChange)
_NO_ADJUSTMENTS = np.empty(0, ADJUSTMENT_DTYPE)


class BatchError(ValueError):
    """A step batch that a stage cannot run: says which field, which value and which limit."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest step a stage is built for.

    Attributes:
        max_tokens: rows of one step.
        max_sequences: sequences of one step, and slots that they are kept in.
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
    def max_length(self) -> int:
        """Tokens of the longest sequence that can run: the context, or the whole cache if that holds less."""
        return min(self.max_context, self.n_kv_blocks * self.block_size)

    @property
    def total_context(self) -> int:
        """Positions of all sequences of a step together, which the cache holds."""
        return min(self.max_sequences * self.max_context, self.n_kv_blocks * self.block_size)

    @property
    def table_width(self) -> int:
        """Blocks that a sequence of `max_context` positions takes."""
        return -(-self.max_context // self.block_size)

    @property
    def table_entries(self) -> int:
        """Entries of all block tables."""
        return self.max_sequences * self.table_width

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
    table_rows: int
    first_partitions: int
    output_rows: int
    sampling: int
    table_changes: int
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
        self._add("table_rows", 4 * limits.max_sequences)
        self._add("first_partitions", 4 * limits.max_sequences)
        self._add("output_rows", 4 * limits.max_outputs)
        self._add("sampling", SAMPLING_ROW_DTYPE.itemsize * limits.max_outputs)
        # Adjustments follow the table changes that a step has, wherever those end: the changes' address is
        # their base too, and the sampling rows' indices are shifted. Hence one unit of alignment to spare.
        changes = _TABLE_CHANGE_DTYPE.itemsize * limits.table_entries
        self._add("tail", changes + _ALIGNMENT + ADJUSTMENT_DTYPE.itemsize * limits.max_adjustments)

    def addresses(self, base: int) -> InputAddresses:
        """The inputs' addresses in a device buffer at `base`."""
        at = {name: base + offset for name, offset in self.offsets.items()}
        tail = at.pop("tail")
        return InputAddresses(**at, table_changes=tail, adjustments=tail)

    def _add(self, name: str, nbytes: int) -> None:
        self.offsets[name] = self.nbytes
        self.nbytes += align_up(nbytes, _ALIGNMENT)


class SequenceStates:
    """What a stage keeps of the sequences in its slots: a mirror of the block tables, and adjustments."""

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        # Block 0 where nothing was set: a wrong batch may read what others own, but never beyond the cache.
        self._tables = np.zeros((limits.max_sequences, limits.table_width), np.int32)
        self._unsent: list[np.ndarray] = []
        self._adjustments: dict[int, np.ndarray] = {}

    def note(self, batch: StepBatch) -> None:
        """Take over a batch's changes.

        Raises:
            BatchError: they name rows, columns, blocks or slots that do not exist.
        """
        if len(entries := batch.table_entries):
            row, column = entries["row"], entries["column"]
            _check_range("rows of block tables", row, len(self._tables))
            _check_range("columns of block tables", column, self._tables.shape[1])
            _check_range("blocks", entries["block"], self._limits.n_kv_blocks)
            self._tables[row, column] = entries["block"]
            self._unsent.append(row * np.int32(self._tables.shape[1]) + column)
        if len(changes := batch.adjustment_changes):
            _check_range("slots of adjustments", changes["slot"], len(self._tables))
            for slot in np.unique(changes["slot"]).tolist():
                self._change_adjustments(slot, changes[changes["slot"] == slot])

    def table_changes(self) -> np.ndarray:
        """Entries of the block tables that the device does not know, `TableChange` (n,), each place once."""
        places = self._unsent[0] if len(self._unsent) == 1 else np.unique(np.concatenate(self._unsent))
        changes = np.empty(len(places), _TABLE_CHANGE_DTYPE)
        changes["place"], changes["block"] = places, self._tables.reshape(-1)[places]
        return changes

    @property
    def has_table_changes(self) -> bool:
        """Whether the device's block tables are out of date."""
        return bool(self._unsent)

    def sent(self) -> None:
        """The device will know all changes so far."""
        self._unsent.clear()

    def cache_slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where tokens go in the cache, block * block_size + place in the block: int32 (n_tokens,)."""
        block_size = self._limits.block_size
        blocks, places = np.divmod(positions, np.int32(block_size))
        return self._tables[rows, blocks] * np.int32(block_size) + places

    def adjustments(self, slot: int, n: int) -> np.ndarray:
        """The first `n` adjustments of a slot. Raises BatchError if there are fewer."""
        known = self._adjustments.get(slot, _NO_ADJUSTMENTS)
        if n > len(known):
            raise BatchError(f"slot {slot} has {len(known)} adjustments, not {n}")
        return known[:n]

    def _change_adjustments(self, slot: int, changes: np.ndarray) -> None:
        index = changes["index"]
        _check_range("numbers of adjustments", index, self._limits.max_adjustments)
        known = self._adjustments.get(slot, _NO_ADJUSTMENTS)
        if (end := int(index.max()) + 1) > len(known):
            known = np.concatenate([known, np.zeros(2 * end - len(known), ADJUSTMENT_DTYPE)])
            self._adjustments[slot] = known
        known[index] = changes["adjustment"]


class InputStaging:
    """One host buffer of the layout, seen as its inputs."""

    def __init__(self, layout: InputLayout, buffer: HostBuffer) -> None:
        limits, array = layout.limits, buffer.array

        def view(name: str, count: int, dtype: np.dtype | type = np.int32) -> np.ndarray:
            start = layout.offsets[name]
            return array[start : start + count * np.dtype(dtype).itemsize].view(dtype)

        self.buffer = buffer
        self.step = view("step", 4)
        self.token_ids = view("token_ids", limits.max_tokens)
        self.positions = view("positions", limits.max_tokens)
        self.slots = view("slots", limits.max_tokens)
        self.sequences = view("sequences", limits.max_tokens)
        self.query_starts = view("query_starts", limits.max_sequences + 1)
        self.table_rows = view("table_rows", limits.max_sequences)
        self.first_partitions = view("first_partitions", limits.max_sequences)
        self.output_rows = view("output_rows", limits.max_outputs)
        self.sampling = view("sampling", limits.max_outputs, SAMPLING_ROW_DTYPE)
        self.tail = array[layout.offsets["tail"] :]
        self.tail_offset = layout.offsets["tail"]


class StepInputs:
    """Checks a batch and lays it out in host memory as the device will see it.

    Args:
        limits: of steps.
        n_vocab: token ids are below it.
        looks_up: the stage knows what was sampled last in a slot, so that ids may stand for that.
    """

    def __init__(self, limits: StepLimits, n_vocab: int, looks_up: bool) -> None:
        self._limits, self._n_vocab, self._looks_up = limits, n_vocab, looks_up
        self._states = SequenceStates(limits)

    def pack(self, batch: StepBatch, staging: InputStaging, samples: bool) -> int:
        """Check a batch and lay it out in a host buffer.

        Args:
            batch: the step.
            staging: to be filled.
            samples: sampling rows and adjustments are wanted too.

        Returns:
            How many bytes from the start of the buffer the device needs.

        Raises:
            BatchError: the batch contradicts itself or exceeds a limit; the buffer then holds nothing of use.
        """
        states = self._states
        states.note(batch)
        n_tokens, n_sequences, n_outputs = self._check(batch)
        sequences = _sequence_of_each(batch)

        staging.token_ids[:n_tokens] = batch.token_ids
        staging.positions[:n_tokens] = batch.positions
        staging.slots[:n_tokens] = states.cache_slots(batch.slots[sequences], batch.positions)
        staging.sequences[:n_tokens] = sequences
        staging.query_starts[: n_sequences + 1] = batch.query_starts
        staging.table_rows[:n_sequences] = batch.slots
        staging.first_partitions[:n_sequences] = _first_partitions(batch)
        staging.output_rows[:n_outputs] = batch.output_rows
        used = 0
        if states.has_table_changes:
            changes = states.table_changes()
            used = changes.nbytes
            staging.tail[:used] = changes.view(np.uint8)
        staging.step[:] = n_tokens, n_sequences, n_outputs, used // _TABLE_CHANGE_DTYPE.itemsize
        if samples:
            used = self._pack_sampling(batch, staging, used)
        states.sent()
        return staging.tail_offset + used

    def _check(self, batch: StepBatch) -> tuple[int, int, int]:
        """Sizes and ranges; returns how many tokens, sequences and outputs there are."""
        limits = self._limits
        n_tokens, n_sequences = len(batch.token_ids), len(batch.slots)
        n_outputs = len(batch.output_rows)
        for what, count, least, most in (
            ("tokens", n_tokens, 1, limits.max_tokens),
            ("sequences", n_sequences, 1, limits.max_sequences),
            ("output rows", n_outputs, 0, limits.max_outputs),
            ("positions", len(batch.positions), n_tokens, n_tokens),
            ("query starts", len(batch.query_starts), n_sequences + 1, n_sequences + 1),
            ("most probable tokens", batch.n_top, 0, MAX_TOP_LOGPROBS),
        ):
            if not least <= count <= most:
                raise BatchError(
                    f"step {batch.step_id} has {count} {what}, but {least} to {most} are possible here"
                )
        least_id = -limits.max_sequences if self._looks_up else 0
        if batch.token_ids.min() < least_id or batch.token_ids.max() >= self._n_vocab:
            raise BatchError(
                f"step {batch.step_id}: token ids must lie between {least_id} and {self._n_vocab - 1}, "
                f"but range from {batch.token_ids.min()} to {batch.token_ids.max()}"
            )
        _check_range("positions", batch.positions, limits.max_context)
        _check_range("slots", batch.slots, limits.max_sequences)
        _check_range("output_rows", batch.output_rows, n_tokens)
        return n_tokens, n_sequences, n_outputs

    def _pack_sampling(self, batch: StepBatch, staging: InputStaging, used: int) -> int:
        """Lay sampling rows out, and adjustments from `used` bytes of the tail on; returns the new end."""
        n_outputs = len(batch.output_rows)
        if len(batch.sampling) != n_outputs:
            raise BatchError(
                f"step {batch.step_id} has {len(batch.sampling)} sampling rows for {n_outputs} output rows"
            )
        rows = staging.sampling[:n_outputs]
        rows[:] = batch.sampling
        _check_range("slots of sampling rows", rows["slot"], self._limits.max_sequences)
        counts = rows["end_adjustment"]
        adjusted = np.flatnonzero(counts)
        if not len(adjusted):
            return used
        if counts.min() < 0 or counts.sum() > self._limits.max_adjustments:
            raise BatchError(
                f"step {batch.step_id} has {counts.sum()} adjustments, but at most "
                f"{self._limits.max_adjustments} are possible here"
            )
        entry = ADJUSTMENT_DTYPE.itemsize
        end = -(-used // entry)
        for row in adjusted.tolist():
            adjustments = self._states.adjustments(int(rows["slot"][row]), int(counts[row]))
            _check_range("adjustments' tokens", adjustments["token"], self._n_vocab)
            begin, end = end, end + len(adjustments)
            staging.tail[begin * entry : end * entry] = adjustments.view(np.uint8)
            rows["first_adjustment"][row], rows["end_adjustment"][row] = begin, end
        return end * entry


def _sequence_of_each(batch: StepBatch) -> np.ndarray:
    """The number of each token's sequence in the step, int32 (n_tokens,). Raises BatchError."""
    starts, positions = batch.query_starts, batch.positions
    counts = np.diff(starts)
    if starts[0] != 0 or starts[-1] != len(positions) or counts.min() < 1:
        raise BatchError(
            f"step {batch.step_id}: query starts {starts} do not ascend from 0 to {len(positions)}; "
            "each sequence must have at least one token"
        )
    sequences = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    follows = sequences[1:] == sequences[:-1]
    if ((positions[1:] - positions[:-1] != 1) & follows).any():
        raise BatchError(f"step {batch.step_id}: the positions of a sequence must follow one another")
    return sequences


def _first_partitions(batch: StepBatch) -> np.ndarray:
    """For each sequence, the partitions of those before it; one with many queries needs none."""
    starts = batch.query_starts
    partitions = batch.positions[starts[1:] - 1] // np.int32(PARTITION) + np.int32(1)
    partitions[np.diff(starts) > 1] = 0
    return np.cumsum(partitions, dtype=np.int32) - partitions


def _check_range(what: str, values: np.ndarray, end: int) -> None:
    if len(values) and not 0 <= values.min() <= values.max() < end:
        raise BatchError(
            f"{what} must lie between 0 and {end - 1}, but range from {values.min()} to {values.max()}"
        )
