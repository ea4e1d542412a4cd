"""The public face: ``from redshard import LLM, SamplingParams``; ``python -m redshard`` is the command line.

Names are imported when they are first asked for, because `LLM` brings Ray, which takes a second.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from redshard.cluster.client.llm import LLM
    from redshard.cluster.completion import Completion, CompletionChunk, TokenLogprob, Usage
    from redshard.cluster.engine.sampling_params import SamplingParams
    from redshard.cluster.errors import (
        ModelError,
        ParameterError,
        PipelineError,
        PromptError,
        RedshardError,
        RequestError,
    )
    from redshard.worker.configuration import WorkerConfiguration

__all__ = [
    "LLM",
    "Completion",
    "CompletionChunk",
    "ModelError",
    "ParameterError",
    "PipelineError",
    "PromptError",
    "RedshardError",
    "RequestError",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
    "WorkerConfiguration",
]

# A checkout has no compiled module of its own; `redshard._cpu` is then that of a build or an installation.
__path__ = extend_path(__path__, __name__)

_HOMES = {
    "cluster.client.llm": ("LLM",),
    "cluster.completion": ("Completion", "CompletionChunk", "TokenLogprob", "Usage"),
    "cluster.engine.sampling_params": ("SamplingParams",),
    "cluster.errors": (
        "ModelError",
        "ParameterError",
        "PipelineError",
        "PromptError",
        "RedshardError",
        "RequestError",
    ),
    "worker.configuration": ("WorkerConfiguration",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
