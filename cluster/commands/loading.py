"""Loading a model for a command, with a progress bar on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from cluster.llm import LLM


class DeviceName(str, Enum):
    """Where a model may run."""

    AUTO = "auto"
    CPU = "cpu"
    HIP = "hip"
    CUDA = "cuda"


ModelArgument = Annotated[
    str, typer.Argument(help="GGUF file, or any file of a split set.", show_default=False)
]
StagesOption = Annotated[int, typer.Option(min=1, help="Workers that share the model's layers.")]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to run; auto takes GPUs if there are enough.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    started = time.perf_counter()
    with _progress() as on_progress:
        llm = LLM(model, on_progress=on_progress, **options)
    with llm:
        yield Loaded(llm, time.perf_counter() - started)


@contextmanager
def _progress() -> Iterator[Any]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("starting workers", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, description="loading", completed=done, total=total or None)

        yield on_progress
