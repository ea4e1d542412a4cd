"""Decide where each weight of a stage lies before anything is allocated: pure, printable, testable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redshard.loader.units import format_bytes
from redshard.worker.configuration import PoolSettings


class PoolError(RuntimeError):
    """A request on device memory that cannot be met; the message holds the numbers."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A named range of an allocation; bytes."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """One allocation to be: its size in bytes and what lies in it, by ascending offset."""

    nbytes: int
    placements: tuple[PackedTensor, ...]

    @property
    def padding(self) -> int:
        """Bytes that hold no tensor."""
        return self.nbytes - sum(placement.nbytes for placement in self.placements)


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """Every allocation for the weights of a stage."""

    segments: tuple[SegmentPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def padding(self) -> int:
        """Bytes that hold no tensor."""
        return sum(segment.padding for segment in self.segments)

    def __str__(self) -> str:
        """One line a segment, then the totals."""
        lines = [
            f"segment {number}: {format_bytes(segment.nbytes)}, {len(segment.placements)} tensors, "
            f"{format_bytes(segment.padding)} padding"
            for number, segment in enumerate(self.segments)
        ]
        share = self.padding / self.nbytes if self.nbytes else 0.0
        return "\n".join(
            [
                *lines,
                f"total: {format_bytes(self.nbytes)} in {len(self.segments)} segments, {share:.3%} padding",
            ]
        )


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is at least `value`."""
    return (value + alignment - 1) & -alignment


def plan_packing(tensors: Sequence[tuple[str, int]], settings: PoolSettings) -> PackingPlan:
    """Pack tensors, the largest first, each into the first segment with room.

    A segment has at most `settings.segment_bytes`, except that a larger tensor has a segment of its own, and
    that segments may grow up to twice that where tensors fit so badly (most just over half a segment) that
    there would be more than ceil(total / segment_bytes) + 1 segments. So that bound holds for tensors of any
    size, counting each rounded up to the alignment. A segment ends with its last tensor, rounded up to the
    alignment: aligned loads of up to that size never leave it.

    Args:
        tensors: (name, bytes) of each tensor.
        settings: segment size and alignment.

    Raises:
        PoolError: two tensors of one name, or a size below one byte.
    """
    _check_tensors(tensors)
    ordered = sorted(tensors, key=lambda tensor: (-tensor[1], tensor[0]))
    segment_bytes = int(settings.segment_bytes)
    bound = -(-sum(nbytes for _, nbytes in ordered) // segment_bytes) + 1
    for quarters in range(4, 9):
        packed = _first_fit(ordered, segment_bytes * quarters // 4, settings.alignment)
        if len(packed) <= bound:
            break
    return PackingPlan(tuple(packed))


def _check_tensors(tensors: Sequence[tuple[str, int]]) -> None:
    seen: set[str] = set()
    for name, nbytes in tensors:
        if nbytes < 1:
            raise PoolError(f"tensor {name!r} has {nbytes} bytes; at least one is needed")
        if name in seen:
            raise PoolError(f"two tensors are named {name!r}")
        seen.add(name)


def _first_fit(ordered: Sequence[tuple[str, int]], capacity: int, alignment: int) -> list[SegmentPlan]:
    contents: list[list[tuple[str, int]]] = []
    room: list[int] = []
    for name, nbytes in ordered:
        padded = align_up(nbytes, alignment)
        place = next((i for i, free in enumerate(room) if padded <= free), None)
        if place is None:
            place = len(contents)
            contents.append([])
            room.append(max(capacity, padded))
        contents[place].append((name, nbytes))
        room[place] -= padded
    return [_segment(tensors, alignment) for tensors in contents]


def _segment(tensors: Sequence[tuple[str, int]], alignment: int) -> SegmentPlan:
    placements = []
    offset = 0
    for name, nbytes in tensors:
        placements.append(PackedTensor(name, offset, nbytes))
        offset += align_up(nbytes, alignment)
    return SegmentPlan(offset, tuple(placements))
