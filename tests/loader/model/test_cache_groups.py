"""Which layers share blocks, and what a token costs in them."""

from __future__ import annotations

from pathlib import Path

from support.gguf_models import tiny_config, write_model

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.cache_groups import cache_groups
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.shard_plan import ModelSize


def test_bytes_of_a_llama_3_8b_token() -> None:
    config = tiny_config(n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128)
    (group,) = cache_groups(config, range(32))
    assert group.bytes_per_token == 131072


def test_layers_of_a_stage_are_one_group(tmp_path: Path) -> None:
    config = tiny_config(n_layers=4, n_heads=[4, 2, 6, 4], n_kv_heads=[4, 1, 2, 2], value_dim=16)
    (group,) = cache_groups(config, range(1, 3))
    assert [layer for layer, _ in group.layers] == [1, 2]
    assert group.bytes_per_token == 2 * (1 + 2) * (32 + 16)
    with GGUFFile.open(write_model(tmp_path / "m.gguf", config)) as file:
        size = ModelSize.of(config, ModelTensors(config, file))
    assert sum(size.kv_per_token[1:3]) == group.bytes_per_token


def test_no_layers_no_group() -> None:
    assert cache_groups(tiny_config(), range(0)) == ()
