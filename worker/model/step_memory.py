"""How much memory steps take beside weights and cache, told before there is a device."""

from __future__ import annotations

import redshard._cpu as _cpu
from redshard.loader.model.model_config import ModelConfig
from redshard.worker.device.kernel_set import attention_scratch_bytes
from redshard.worker.model.sampler import SampleOutputs
from redshard.worker.model.step_inputs import InputLayout, StepLimits

# An activation in every form that readers want: float32; int8 quants, a scale and a sum for 32 of them.
_ACTIVATION_BYTES = 4 + 1 + 8 / 32


def step_bytes(config: ModelConfig, limits: StepLimits) -> int:
    """Bytes of inputs, activations, logits and rotary table that a stage has at most, on any device.

    Args:
        config: of the model.
        limits: the largest step, and the cache.
    """
    max_context = limits.table_width * limits.block_size
    scratch = max(
        attention_scratch_bytes(
            limits.max_tokens, limits.max_sequences, config.n_heads, config.value_dim, limits.total_context
        ),
        _cpu.attention_scratch_bytes(limits.max_tokens, config.n_heads, config.value_dim, max_context),
    )
    attention = limits.max_tokens * (
        4 * (config.n_q + config.n_k + config.n_v) + _ACTIVATION_BYTES * config.n_attn
    )
    feed_forward = limits.max_tokens * _ACTIVATION_BYTES * config.n_ff
    output = limits.max_outputs * (_ACTIVATION_BYTES * config.n_embd + 4 * config.n_vocab)
    residual = limits.max_tokens * (4 + _ACTIVATION_BYTES) * config.n_embd
    sampled = SampleOutputs(limits.max_outputs).nbytes(n_top=1)
    # Phases of a step share their memory.
    activations = residual + max(attention + scratch, feed_forward, output + sampled)
    return int(activations) + InputLayout(limits).nbytes + 4 * config.rope.n_rot * limits.max_context
