"""The public face: ``from redshard import LLM, SamplingParams``; ``python -m redshard`` is the CLI."""

from __future__ import annotations

if __name__ == "__main__":  # before everything else, which the command line does not wait for
    from cluster.cli import main

    main()

from cluster.completion import Completion, CompletionChunk, Usage
from cluster.errors import (
    ModelError,
    ParameterError,
    PipelineError,
    PromptError,
    RedshardError,
    RequestError,
)
from cluster.llm import LLM
from cluster.requests import TokenLogprob
from cluster.sampling_params import SamplingParams
from worker.configuration import WorkerConfiguration

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
