"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

#: As of `redshard.cluster.client.llm`, which brings Ray.
MAX_SEQUENCES = 4096


class DeviceName(str, Enum):
    """Where a model may run."""

    AUTO = "auto"
    CPU = "cpu"
    HIP = "hip"
    CUDA = "cuda"


ModelArgument = Annotated[
    str,
    typer.Argument(help="GGUF file, any file of a split set, or a shipped model: demo.", show_default=False),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of each sequence; the model's own context, at most 4096, unless given.",
        show_default=False,
    ),
]
SequencesOption = Annotated[int, typer.Option(min=1, max=MAX_SEQUENCES, help="Sequences at the same time.")]
StagesOption = Annotated[int, typer.Option(min=1, help="Workers that share the model's layers.")]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to run; auto takes GPUs if there are enough.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
