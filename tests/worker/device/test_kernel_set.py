"""Which launches make an operation."""

from __future__ import annotations

import pytest

from redshard.worker.device.arguments import (
    PARTITION,
    AttentionArguments,
    MatmulArguments,
    Matrix,
    RmsNormArguments,
    RopeStoreArguments,
)
from redshard.worker.device.base import DeviceError
from redshard.worker.device.kernel_set import TILES, attention_scratch_bytes, launches

F16, Q4_K, Q6_K = 1, 12, 14


def matrices(*types: int) -> MatmulArguments:
    arguments = MatmulArguments(n_matrices=len(types), width=256)
    for m, quant_type in enumerate(types):
        arguments.w[m] = Matrix(1000 + m, 0, quant_type, 100 + m)
        arguments.y[m] = 2000 + m
    return arguments


def test_matrices_of_one_type_share_a_launch() -> None:
    arguments = matrices(Q4_K, Q6_K, Q4_K)
    first, second = launches("matmul", arguments, 1, 32)
    for launch, members in ((first, [0, 2]), (second, [1])):
        part = launch.arguments
        assert launch.macros == (("WEIGHT_TYPE", arguments.w[members[0]].type),)
        assert [part.w[i].data for i in range(part.n_matrices)] == [1000 + m for m in members]
        assert [part.y[i] for i in range(part.n_matrices)] == [2000 + m for m in members]
    assert [arguments.w[m].data for m in range(3)] == [1000, 1001, 1002]


@pytest.mark.parametrize("operation", ["matmul", "swiglu"])
def test_tiles_grow_with_the_rows_they_are_for(operation: str) -> None:
    for source in ("matmul_tile", "matmul_tile_float"):
        tiles = TILES[operation, source]
        assert len(tiles) > 1
        assert [tile.tokens for tile in tiles] == sorted({tile.tokens for tile in tiles})
        assert all((tile.waves is None) == (source == "matmul_tile_float") for tile in tiles)


@pytest.mark.parametrize(
    ("quant_type", "rows", "kernel", "tiles"),
    [
        (Q4_K, 1, "matmul_vector_1", 1),
        (Q4_K, 3, "matmul_tile_16", 1),
        (Q4_K, 8, "matmul_vector_8", 1),
        (Q4_K, 9, "matmul_tile_16", 1),
        (Q4_K, 17, "matmul_tile_32", 1),
        (Q4_K, 64, "matmul_tile_64", 1),
        (Q4_K, 65, "matmul_tile_128", 1),
        (Q4_K, 300, "matmul_tile_128", 3),
        (F16, 8, "matmul_vector_8", 1),
        (F16, 9, "matmul_tile_float_32", 1),
        (F16, 300, "matmul_tile_float_64", 5),
    ],
)
def test_the_number_of_rows_decides_the_kernel(quant_type: int, rows: int, kernel: str, tiles: int) -> None:
    arguments = matrices(quant_type)
    arguments.w[0].n_rows = 20_000
    (launch,) = launches("matmul", arguments, rows, 64)
    assert launch.kernel == kernel
    if "tile" in kernel:
        assert launch.grid[0] == tiles


@pytest.mark.parametrize(
    ("height", "rows", "kernel"),
    [
        (4096, 64, "matmul_tile_64"),
        (2048, 64, "matmul_tile_32"),
        (1000, 64, "matmul_tile_16"),
        (2048, 1024, "matmul_tile_128"),
    ],
)
def test_a_small_matrix_takes_small_tiles(height: int, rows: int, kernel: str) -> None:
    arguments = matrices(Q4_K)
    arguments.w[0].n_rows = height
    (launch,) = launches("matmul", arguments, rows, 32)
    assert launch.kernel == kernel


@pytest.mark.parametrize("wave_size", [32, 64])
@pytest.mark.parametrize("rows", [1, 4, 16, 32, 64, 70])
def test_every_row_of_a_matrix_is_covered(wave_size: int, rows: int) -> None:
    arguments = matrices(Q4_K, Q4_K)
    arguments.w[1].n_rows = 3001
    (launch,) = launches("matmul", arguments, rows, wave_size)
    tile = next(
        (tile for tile in TILES["matmul", "matmul_tile"] if launch.kernel.endswith(f"tile_{tile.tokens}")),
        None,
    )
    per_group = tile.rows if tile else 2 * launch.threads // wave_size
    assert max(launch.grid[:2]) == -(-100 // per_group) + -(-3001 // per_group)


def test_short_launches_overlap() -> None:
    for rows in (1, 64, 65):
        (launch,) = launches("matmul", matrices(Q4_K), rows, 32)
        assert launch.overlaps == (rows <= 64)


def test_attention_of_one_row_needs_no_tiles() -> None:
    arguments = AttentionArguments(
        n_heads=9, n_kv_heads=1, head_dim=64, value_dim=64, block_size=16, table_width=33, max_sequences=5
    )
    kernels = [launch.kernel for launch in launches("attention", arguments, 1, 32)]
    assert kernels == ["attention_vector", "attention_combine"]
    vector, tile, combine = launches("attention", arguments, 6, 32)
    partitions = -(-33 * 16 // PARTITION)
    assert vector.grid == (5, 3, partitions)  # nine query heads are three groups
    assert tile.grid[:2] == (3, 9)
    assert combine.grid[:2] == (6, -(-9 * 64 // combine.threads))


def test_attention_launches_no_more_than_sequences_may_need() -> None:
    arguments = AttentionArguments(
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        value_dim=128,
        block_size=16,
        table_width=512,
        max_sequences=64,
    )
    splits = {}
    for rows in (1, 16, 64, 2048):
        vector, *tile, _ = launches("attention", arguments, rows, 32)
        splits[rows] = vector.arguments.splits
        assert vector.grid == (min(rows, 64), 8, splits[rows])
        if rows > 64:
            assert tile[0].grid[0] == rows // 64 + 64  # every sequence may have one tile that is not full
    assert splits == {1: 8, 16: 8, 64: 2, 2048: 2}


def test_scratch_grows_with_the_contexts_together() -> None:
    few, many = (attention_scratch_bytes(2048, 8, 32, 128, 128 * n) for n in (800, 801))
    assert many - few == 4 * 32 * 130
    assert attention_scratch_bytes(256, 256, 32, 128, 1 << 20) < 200 << 20  # in a cache of a million tokens
    assert attention_scratch_bytes(4, 8, 32, 128, 256) == attention_scratch_bytes(4, 4, 32, 128, 256)


def test_what_no_kernel_can_do_is_refused() -> None:
    with pytest.raises(DeviceError, match="at least 1 row, not 0"):
        launches("rms_norm", RmsNormArguments(), 0, 32)
    with pytest.raises(DeviceError, match="heads of 12 and 64 elements must be multiples of 8"):
        launches("attention", AttentionArguments(n_heads=1, n_kv_heads=1, head_dim=12, value_dim=64), 1, 32)
    with pytest.raises(DeviceError, match="at least 1 sequence, not 0"):
        launches("attention", AttentionArguments(n_heads=1, n_kv_heads=1, head_dim=64, value_dim=64), 1, 32)
    with pytest.raises(DeviceError, match=r"heads of 512 elements are too large.*holds 256"):
        launches("rope_store", RopeStoreArguments(n_heads=1, n_kv_heads=1, head_dim=512), 1, 32)
