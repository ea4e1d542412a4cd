"""What a pipeline is to be, and what follows: limits of steps, memory, layers of each stage. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from redshard.cluster.errors import ModelError
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.shard_plan import (
    DEFAULT_OVERHEAD_BYTES,
    DeviceBudget,
    ModelSize,
    PlanError,
    ShardPlan,
    plan_shards,
)
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.choose import DeviceKind
from redshard.worker.memory.kv_cache import DEFAULT_BLOCK_SIZE
from redshard.worker.model.handoff import HandoffType
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.step_memory import step_bytes
from redshard.worker.model.weights import StagePart

#: Rows of one step whose logits are wanted, at least; a request for logits gets that many at once.
MIN_STEP_OUTPUTS = 64
_DEFAULT_STEP_TOKENS, _LEAST_STEP_TOKENS = 512, 128


@dataclass(frozen=True, slots=True)
class PipelineSettings:
    """What a pipeline is to be.

    Attributes:
        path: absolute path of the model, the same on every node.
        n_stages: workers that share the layers.
        kind: of device.
        max_context: tokens a sequence may have.
        max_sequences: sequences that may run at once.
        max_step_tokens: tokens of one step.
        cache_tokens: tokens the key/value cache is to hold; None for max_context of each sequence, or as many
            as fit.
        handoff: element type of hidden states between stages.
        worker: configuration of the workers.
    """

    path: str
    n_stages: int
    kind: DeviceKind
    max_context: int
    max_sequences: int
    max_step_tokens: int
    cache_tokens: int | None
    handoff: HandoffType
    worker: WorkerConfiguration


def default_step_tokens(n_stages: int, max_sequences: int) -> int:
    """Tokens of a step, unless said otherwise: chunks of one prompt keep all stages busy."""
    return max(_DEFAULT_STEP_TOKENS // n_stages, 2 * max_sequences, _LEAST_STEP_TOKENS)


def overhead_bytes(config: ModelConfig, settings: PipelineSettings, cache_tokens: int) -> int:
    """What a device needs besides weights and a cache of so many tokens."""
    return DEFAULT_OVERHEAD_BYTES + step_bytes(config, step_limits(settings, cache_tokens))


def plan_with_cache(
    size: ModelSize,
    devices: list[DeviceBudget],
    settings: PipelineSettings,
    overhead_bytes: Callable[[int], int],
) -> tuple[ShardPlan, int]:
    """The plan, and the tokens its cache holds: as many as wanted, or as fit if nothing was asked for.

    Args:
        size: of the model.
        devices: with what may be used of them.
        settings: of the pipeline.
        overhead_bytes: what a device needs besides weights and a cache of so many tokens.

    Raises:
        ModelError: the model, or the cache asked for, or the cache of a single sequence does not fit.
    """
    block = DEFAULT_BLOCK_SIZE
    one_sequence = -(-settings.max_context // block) * block
    wanted = settings.cache_tokens or one_sequence * settings.max_sequences
    wanted = max(block, wanted // block * block)
    # A larger cache also needs more beside it, so what fits is found in two steps.
    least = overhead_bytes(min(wanted, one_sequence))
    try:
        plan_shards(size, devices, wanted, least)
        return plan_shards(size, devices, wanted, overhead_bytes(wanted)), wanted
    except PlanError as error:
        if settings.cache_tokens is not None:
            raise ModelError(str(error)) from error
    try:
        most = plan_shards(size, devices, one_sequence, least).kv_tokens
        plan = plan_shards(size, devices, one_sequence, overhead_bytes(min(wanted, most)))
    except PlanError as error:
        raise ModelError(str(error)) from error
    return plan, min(wanted, plan.kv_tokens // block * block)


def stage_parts(plan: ShardPlan) -> tuple[StagePart, ...]:
    """What each stage of a plan loads."""
    last = len(plan.stages) - 1
    return tuple(
        StagePart(range(stage.first, stage.last), is_first=i == 0, is_last=i == last)
        for i, stage in enumerate(plan.stages)
    )


def step_limits(settings: PipelineSettings, cache_tokens: int) -> StepLimits:
    """The largest step the workers are built for."""
    return StepLimits(
        max_tokens=settings.max_step_tokens,
        max_sequences=settings.max_sequences,
        max_outputs=max(settings.max_sequences, MIN_STEP_OUTPUTS),
        max_context=settings.max_context,
        n_kv_blocks=cache_tokens // DEFAULT_BLOCK_SIZE,
        block_size=DEFAULT_BLOCK_SIZE,
    )
