"""How much memory steps take beside weights and cache, told before there is a device."""

from __future__ import annotations

import redshard._cpu as _cpu
from redshard.loader.model.configuration import AttentionConfig, ModelConfig
from redshard.loader.model.rotary import rotary_bytes
from redshard.worker.device.arguments import Matrix
from redshard.worker.device.kernel_set import attention_scratch_bytes
from redshard.worker.model.arena import Arena
from redshard.worker.model.blocks.block import UNKNOWN_TYPE, LayerCache, Site
from redshard.worker.model.forward import ForwardPass
from redshard.worker.model.step_inputs import InputLayout, StepLimits
from redshard.worker.model.weights import StagePart, StageWeights, Weights


def step_bytes(config: ModelConfig, limits: StepLimits) -> int:
    """Bytes of inputs, activations, logits and rotary tables that a stage has at most, on any device.

    Args:
        config: of the model.
        limits: the largest step, and the cache.
    """
    layers = range(config.n_layers)
    unknown = _UnknownWeights()
    layout, arena = InputLayout(limits), Arena()
    site = Site(
        weights=StageWeights(
            config, StagePart(layers, is_first=True, is_last=True), dict.fromkeys(layers, unknown), unknown
        ),
        limits=limits,
        inputs=layout.addresses(0),
        arena=arena,
        caches=dict.fromkeys(layers, LayerCache(0, 0, 0)),
        rotary=dict.fromkeys(config.ropes, 0),
        newest=None,
        scratch_bytes=lambda attention: _scratch_bytes(attention, limits),
    )
    ForwardPass(site)
    return arena.nbytes + layout.nbytes + sum(rotary_bytes(rope, limits.max_context) for rope in config.ropes)


class _UnknownWeights(Weights):
    """Weights of any type, so that activations must come in all forms that might be read."""

    def matrix(self, role: str) -> Matrix:
        return Matrix(type=UNKNOWN_TYPE)

    def vector(self, role: str) -> int:
        return 0

    def optional_vector(self, role: str) -> int | None:
        return None


def _scratch_bytes(attention: AttentionConfig, limits: StepLimits) -> int:
    """The most that any device's attention wants."""
    n_heads, value_dim = attention.n_heads, attention.value_dim
    max_context = limits.table_width * limits.block_size
    return max(
        attention_scratch_bytes(
            limits.max_tokens, limits.max_sequences, n_heads, value_dim, limits.total_context
        ),
        _cpu.attention_scratch_bytes(limits.max_tokens, n_heads, value_dim, max_context),
    )
