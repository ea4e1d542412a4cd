"""Text that knows which of its characters a chat template wrote, and which came from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import SupportsIndex


class MarkedText(str):
    """A string with a mark for each character: whether the chat template wrote it.

    What cuts, joins or repeats text keeps the marks, and so does a change of case that keeps the length. What
    makes text in any other way gives a plain string, which counts as somebody else's: only what is certain to
    be the template's is marked.

    The names that are not of `str` begin with an underscore, which the templates' sandbox keeps from them.
    """

    __slots__ = ("_marks",)
    _marks: bytes

    def __new__(cls, text: str, marks: bytes | None = None) -> MarkedText:
        """Mark a text.

        marks: a byte for each character, 1 where the template wrote it, else 0; None if it wrote nothing.
        """
        made = super().__new__(cls, str.__str__(text))
        made._marks = bytes(len(text)) if marks is None else marks
        return made

    def __str__(self) -> MarkedText:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> MarkedText:
        if not isinstance(key, slice):
            index = range(len(self))[key]
            key = slice(index, index + 1)
        return MarkedText(str.__getitem__(self, key), self._marks[key])

    def __iter__(self) -> Iterator[MarkedText]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: str) -> MarkedText:
        # Text that was marked as safe HTML joins in its own way, as with any other string.
        return NotImplemented if _is_no_text(other) else joined((self, other))

    def __radd__(self, other: str) -> MarkedText:
        return NotImplemented if _is_no_text(other) else joined((other, self))

    def __mul__(self, times: SupportsIndex) -> MarkedText:
        return MarkedText(str.__mul__(self, times), self._marks * times)

    __rmul__ = __mul__

    def join(self, texts: Iterable[str]) -> MarkedText:
        texts = list(texts)
        return MarkedText(str.join(self, texts), self._marks.join(map(marks_of, texts)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> MarkedText:
        if not old:
            return MarkedText(str.replace(self, old, new, count))
        return joined(self.split(old, count), new)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[MarkedText]:  # type: ignore[override]
        return self._cut(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[MarkedText]:  # type: ignore[override]
        return self._cut(str.rsplit(self, sep, maxsplit), sep)

    def _cut(self, parts: list[str], sep: str | None) -> list[MarkedText]:
        """`parts` of this text, which stand in it in this order with `sep` or white space between them."""
        cut, begin = [], 0
        for part in parts:
            if sep is None:
                begin = self.index(part, begin)
            cut.append(self[begin : begin + len(part)])
            begin += len(part) + len(sep or "")
        return cut

    def splitlines(self, keepends: bool = False) -> list[MarkedText]:  # type: ignore[override]
        lines, begin = [], 0
        for line, with_end in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            lines.append(self[begin : begin + len(line)])
            begin += len(with_end)
        return lines

    def partition(self, sep: str) -> tuple[MarkedText, MarkedText, MarkedText]:
        head, _, _ = str.partition(self, sep)
        return self._parted(len(head), len(sep))

    def rpartition(self, sep: str) -> tuple[MarkedText, MarkedText, MarkedText]:
        head, found, _ = str.rpartition(self, sep)
        return self._parted(len(head), len(found))

    def _parted(self, begin: int, length: int) -> tuple[MarkedText, MarkedText, MarkedText]:
        return self[:begin], self[begin : begin + length], self[begin + length :]

    def strip(self, chars: str | None = None) -> MarkedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> MarkedText:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> MarkedText:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> MarkedText:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str) -> MarkedText:
        return self[: len(str.removesuffix(self, suffix))]

    def upper(self) -> MarkedText:
        return self._changed(str.upper)

    def lower(self) -> MarkedText:
        return self._changed(str.lower)

    def capitalize(self) -> MarkedText:
        return self._changed(str.capitalize)

    def title(self) -> MarkedText:
        return self._changed(str.title)

    def _changed(self, change: Callable[[str], str]) -> MarkedText:
        """What a change of case makes of the text. It lengthens some characters and shortens none."""
        text = change(str.__str__(self))
        return MarkedText(text, self._marks if len(text) == len(self) else None)


def written(text: str) -> MarkedText:
    """Text that the template wrote."""
    return MarkedText(text, b"\1" * len(text))


def marks_of(text: str) -> bytes:
    """A byte for each character: 1 where it is certain that the template wrote it, else 0."""
    return text._marks if isinstance(text, MarkedText) else bytes(len(text))


def unmarked(text: str) -> str:
    """The text alone."""
    return str.__str__(text)


def joined(texts: Iterable[str], between: str = "") -> MarkedText:
    """The texts in a row, with their marks."""
    return MarkedText(between, marks_of(between)).join(texts)


def _is_no_text(value: object) -> bool:
    return not isinstance(value, str) or hasattr(value, "__html__")
