"""What can go wrong for people who use Redshard. Each message is a sentence: what, where and what to do."""

from __future__ import annotations

from redshard.cluster.completion import Completion


class RedshardError(Exception):
    """The base of every error Redshard raises on purpose."""


class ParameterError(RedshardError, ValueError):
    """A parameter has no meaning or is out of its range."""


class PromptError(RedshardError, ValueError):
    """A prompt is empty, too long for the context, or of a kind this model cannot take."""


class ModelError(RedshardError):
    """A model file is missing, broken, of an unknown architecture, or does not fit into the memory."""


class RequestError(RedshardError):
    """A request could not be finished: its steps killed their workers again and again, or it was cancelled.

    Attributes:
        completions: of `generate`, all answers; those that failed end with the finish reason "error".
    """

    completions: list[Completion] | None = None


class PipelineError(RedshardError):
    """The workers cannot be brought up, or cannot be brought back; no request can be served."""


class CapacityError(PipelineError, ValueError):
    """The cluster does not have the GPUs, or CPUs, that the pipeline is to have."""
