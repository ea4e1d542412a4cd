"""Which layers share the blocks of a cache, and what a token costs in it.

The layers of a group keep the same tokens of a sequence, so that one table of block numbers finds them in all
of these layers. Today every layer that attends keeps all tokens: there is one group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from redshard.loader.model.configuration import AttentionConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share blocks and tables.

    Attributes:
        layers: number of each layer in the model, and what it keeps of a token.
    """

    layers: tuple[tuple[int, AttentionConfig], ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return sum(attention.cache_bytes for _, attention in self.layers)


def cache_groups(config: ModelConfig, layers: Iterable[int]) -> tuple[CacheGroup, ...]:
    """The groups of some of a model's layers; none where no layer keeps anything."""
    kept = tuple((layer, body) for layer in layers for body in config.layers[layer].attention)
    return (CacheGroup(kept),) if kept else ()
