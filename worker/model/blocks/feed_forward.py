"""The gated feed-forward of a layer."""

from __future__ import annotations

from redshard.loader.model.configuration import FeedForwardConfig
from redshard.worker.device.arguments import SwigluArguments
from redshard.worker.device.base import Device
from redshard.worker.model.blocks.block import Block, Product, Site


class FeedForwardBlock(Block):
    """silu(x gate^T) * (x up^T) of the normalized stream (https://arxiv.org/abs/2002.05202), projected back.

    Args:
        site: of the stage.
        layer: its number in the model.
        norm: role of the norm's weight.
        config: what is computed.
    """

    def __init__(self, site: Site, layer: int, norm: str, config: FeedForwardConfig) -> None:
        super().__init__(site, layer, norm, readers=("ffn_gate", "ffn_up"))
        self._config = config
        self._down = self.weights.matrix("ffn_down")
        self._gated = site.activation(site.limits.max_tokens, config.n_ff, [self._down])

    def body(self, device: Device, rows: int) -> Product:
        gate, up = self.readers
        arguments = SwigluArguments(
            step=self.site.inputs.step,
            x=self.normed,
            gate=gate,
            up=up,
            out=self._gated,
            width=self.site.n_embd,
        )
        device.launch("swiglu", arguments, rows)
        return Product(self._gated, self._config.n_ff, self._down)
