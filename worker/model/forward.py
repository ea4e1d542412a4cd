"""The forward pass of a stage: embedding, blocks, output, in the order in which they run."""

from __future__ import annotations

from redshard.loader.model.configuration import AttentionConfig, Branch
from redshard.worker.device.arguments import SetTablesArguments
from redshard.worker.device.base import Device
from redshard.worker.model.blocks.attention import AttentionBlock
from redshard.worker.model.blocks.block import Block, Site
from redshard.worker.model.blocks.ends import Embedding, Output
from redshard.worker.model.blocks.feed_forward import FeedForwardBlock


class ForwardPass:
    """Everything a stage computes in a step. Each method puts its operations in order on a device.

    Args:
        site: what the blocks are built on.

    Attributes:
        output: of the last stage, else None.
    """

    def __init__(self, site: Site) -> None:
        part, layers = site.weights.part, site.weights.config.layers
        self._site = site
        self._embedding = Embedding(site) if part.is_first else None
        self._layers = {
            layer: [_block(site, layer, branch) for branch in layers[layer].branches] for layer in part.layers
        }
        self.output = Output(site) if part.is_last else None

    def set_tables(self, device: Device, rows: int) -> None:
        """The step's changes of the block tables; there is one set of tables, since there is one group."""
        (tables,) = {cache.tables for cache in self._site.caches.values()}
        inputs = self._site.inputs
        arguments = SetTablesArguments(step=inputs.step, changes=inputs.table_changes, tables=tables)
        device.launch("set_tables", arguments, rows)

    def layers(self, device: Device, rows: int) -> None:
        """The residual stream through all layers, on the first stage from the token ids on."""
        self.embed(device, rows)
        for layer in self._layers:
            self.layer(device, rows, layer)

    def embed(self, device: Device, rows: int) -> None:
        """On the first stage, the residual stream from the token ids."""
        if self._embedding is not None:
            self._embedding.launch(device, rows)

    def layer(self, device: Device, rows: int, layer: int) -> None:
        """The residual stream through one layer of the stage, by its number in the model."""
        for block in self._layers[layer]:
            block.launch(device, rows)


def _block(site: Site, layer: int, branch: Branch) -> Block:
    """The block that computes a branch of a layer, its activations where those of the others are too."""
    with site.arena.phase():
        if isinstance(branch.body, AttentionConfig):
            return AttentionBlock(site, layer, branch.norm, branch.body)
        return FeedForwardBlock(site, layer, branch.norm, branch.body)
