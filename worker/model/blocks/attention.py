"""Causal attention over the paged cache."""

from __future__ import annotations

from redshard.loader.model.configuration import AttentionConfig
from redshard.worker.device.arguments import AttentionArguments, RopeStoreArguments
from redshard.worker.device.base import Device
from redshard.worker.model.blocks.block import Block, Product, Site


class AttentionBlock(Block):
    """Queries, keys and values of the normalized stream; head norms if any, and rotary embedding
    (https://arxiv.org/abs/2104.09864); keys and values into the cache; softmax over it; projected back.

    Args:
        site: of the stage.
        layer: its number in the model.
        norm: role of the norm's weight.
        config: what is computed.
    """

    def __init__(self, site: Site, layer: int, norm: str, config: AttentionConfig) -> None:
        super().__init__(site, layer, norm, readers=("attn_q", "attn_k", "attn_v"))
        self._config = config
        self._cache = site.caches[layer]
        self._rotary = site.rotary[config.rope]
        self._output = self.weights.matrix("attn_output")
        self._q_norm = self.weights.optional_vector("attn_q_norm")
        self._k_norm = self.weights.optional_vector("attn_k_norm")

        rows = site.limits.max_tokens
        self._q = site.floats(rows, config.n_q)
        self._k = site.floats(rows, config.n_k)
        self._v = site.floats(rows, config.n_v)
        self._mixed = site.activation(rows, config.n_mixed, [self._output])
        self._scratch_bytes = site.scratch_bytes(config)
        self._scratch = site.arena.take(self._scratch_bytes)

    def body(self, device: Device, rows: int) -> Product:
        products = list(zip(self.readers, (self._q, self._k, self._v), strict=True))
        self.site.multiply(device, rows, self.normed, self.site.n_embd, products)
        self._rope_store(device, rows)
        self._attend(device, rows)
        return Product(self._mixed, self._config.n_mixed, self._output)

    def _rope_store(self, device: Device, rows: int) -> None:
        inputs, config = self.site.inputs, self._config
        arguments = RopeStoreArguments(
            step=inputs.step,
            positions=inputs.positions,
            slots=inputs.slots,
            q=self._q,
            k=self._k,
            v=self._v,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            rotary=self._rotary,
            k_cache=self._cache.keys,
            v_cache=self._cache.values,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            value_dim=config.value_dim,
            n_rot=config.rope.n_rot,
            neox=config.rope.style == "neox",
            block_size=self.site.limits.block_size,
            eps=self.site.weights.config.norm_eps,
        )
        device.launch("rope_store", arguments, rows)

    def _attend(self, device: Device, rows: int) -> None:
        inputs, limits, config = self.site.inputs, self.site.limits, self._config
        arguments = AttentionArguments(
            step=inputs.step,
            positions=inputs.positions,
            sequences=inputs.sequences,
            query_starts=inputs.query_starts,
            table_rows=inputs.table_rows,
            first_partitions=inputs.first_partitions,
            block_tables=self._cache.tables,
            q=self._q,
            k_cache=self._cache.keys,
            v_cache=self._cache.values,
            out=self._mixed,
            scratch=self._scratch,
            scratch_bytes=self._scratch_bytes,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            value_dim=config.value_dim,
            block_size=limits.block_size,
            table_width=limits.table_width,
            scale=config.scale,
            max_sequences=limits.max_sequences,
        )
        device.launch("attention", arguments, rows)
