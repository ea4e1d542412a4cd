"""Loading a model for a command, with a progress bar on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from redshard.cluster.client.llm import LLM


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to generate, and how long that took in seconds (Ray's start included)."""

    llm: LLM
    load_s: float

    def worker_bytes(self) -> list[int]:
        """Bytes each worker holds on its device."""
        return [memory["allocated_bytes"] for memory in self.llm.memory_map()]


@contextmanager
def loaded_model(model: str, **options: Any) -> Iterator[Loaded]:
    """`LLM(model, **options)` for the length of a block; nothing of it is left behind.

    Raises:
        RedshardError: as `LLM`.
    """
    # Imported here, because it brings Ray, which takes a second that the other commands need not wait.
    from redshard.cluster.client.llm import LLM

    started = time.perf_counter()
    with _progress() as on_progress:
        llm = LLM(model, on_progress=on_progress, **options)
    with llm:
        yield Loaded(llm, time.perf_counter() - started)


@contextmanager
def _progress() -> Iterator[Any]:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("starting workers", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, description="loading", completed=done, total=total or None)

        yield on_progress
