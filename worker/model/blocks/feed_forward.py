"""The gated feed-forward of a layer."""

from __future__ import annotations

from redshard.loader.model.configuration import FeedForwardConfig
from redshard.worker.device.arguments import SwigluArguments
from redshard.worker.device.base import Device
from redshard.worker.model.blocks.block import Block, Site


class FeedForwardBlock(Block):
    """silu(x gate^T) * (x up^T) of the normalized stream (https://arxiv.org/abs/2002.05202), projected back.

    Args:
        site: of the stage.
        layer: its number in the model.
        norm: role of the norm's weight.
        config: what is computed.
    """

    def __init__(self, site: Site, layer: int, norm: str, config: FeedForwardConfig) -> None:
        self._site, self._config = site, config

        weights = site.weights.layers[layer]
        self._norm = weights.vector(norm)
        self._gate, self._up, self._down = map(weights.matrix, ("ffn_gate", "ffn_up", "ffn_down"))

        rows = site.limits.max_tokens
        with site.arena.phase():
            self._normed = site.activation(rows, site.n_embd, [self._gate, self._up])
            self._gated = site.activation(rows, config.n_ff, [self._down])

    def launch(self, device: Device, rows: int) -> None:
        site = self._site
        site.norm(device, rows, self._norm, self._normed)
        arguments = SwigluArguments(
            step=site.inputs.step,
            x=self._normed,
            gate=self._gate,
            up=self._up,
            out=self._gated,
            width=site.n_embd,
        )
        device.launch("swiglu", arguments, rows)
        site.multiply(
            device, rows, self._gated, self._config.n_ff, [(self._down, site.hidden)], accumulate=True
        )
