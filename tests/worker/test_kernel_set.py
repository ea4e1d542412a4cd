"""Which launches make an operation, and that their sizes are those that the kernels' sources name."""

from __future__ import annotations

import re

import pytest

from worker import kernel_set
from worker.arguments import AttentionArguments, MatmulArguments, Matrix, RmsNormArguments, RopeStoreArguments
from worker.device.base import DeviceError
from worker.kernel_images import source_root
from worker.kernel_set import attention_scratch_bytes, launches

Q4_K, Q6_K = 12, 14


@pytest.mark.parametrize(
    ("file", "constant", "value"),
    [
        ("rows", "ROW_THREADS", kernel_set._ROW_THREADS),
        ("rope_store", "ROPE_THREADS", kernel_set._ROPE_THREADS),
        ("rope_store", "HELD", kernel_set._ROPE_ELEMENTS_PER_LANE),
        ("matmul_vector", "VECTOR_THREADS", kernel_set._VECTOR_THREADS),
        ("matmul_vector", "VECTOR_ROWS", kernel_set._WEIGHT_ROWS_PER_WAVE),
        ("matmul_vector", "SWIGLU_THREADS", kernel_set._SWIGLU_THREADS),
        ("matmul_vector", "SWIGLU_ROWS", kernel_set._SWIGLU_ROWS),
        ("matmul_tile", "TILE_THREADS", kernel_set._TILE_THREADS),
        ("attention", "ATTENTION_THREADS", kernel_set._ATTENTION_THREADS),
        ("attention", "PARTITION", kernel_set._PARTITION),
        ("attention", "PARTITION_STRIDE", kernel_set._PARTITION_STRIDE),
        ("planes", "PLANES_THREADS", kernel_set._PLANES_THREADS),
        ("sample", "SAMPLE_THREADS", kernel_set._SAMPLE_THREADS),
    ],
)
def test_sizes_agree_with_the_sources(file: str, constant: str, value: int) -> None:
    source = (source_root() / "hip" / f"{file}.hip").read_text()
    assert re.findall(rf"constexpr i32 {constant} = (\d+);", source) == [str(value)]


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


@pytest.mark.parametrize(
    ("rows", "kernel", "tiles"),
    [
        (1, "matmul_vector_1", 1),
        (8, "matmul_vector_8", 1),
        (3, "matmul_tile_32", 1),
        (32, "matmul_tile_32", 1),
        (33, "matmul_tile_64_narrow", 1),
        (64, "matmul_tile_64_narrow", 1),
        (65, "matmul_tile_64", 2),
    ],
)
def test_the_number_of_rows_decides_the_kernel(rows: int, kernel: str, tiles: int) -> None:
    (launch,) = launches("matmul", matrices(Q4_K), rows, 64)
    assert (launch.kernel, launch.grid[1]) == (kernel, tiles)


def test_a_matrix_that_fills_a_gpu_takes_wide_tiles() -> None:
    arguments = matrices(Q4_K)
    for height, kernel in ((32_768, "matmul_tile_64_narrow"), (32_769, "matmul_tile_64")):
        arguments.w[0].n_rows = height
        (launch,) = launches("matmul", arguments, 64, 64)
        assert launch.kernel == kernel
        assert launch.grid[0] == -(-height // (32 if kernel.endswith("narrow") else 64))


def test_every_row_of_a_matrix_is_covered() -> None:
    for wave_size in (32, 64):
        for rows in (1, 70):
            (launch,) = launches("matmul", matrices(Q4_K, Q4_K), rows, wave_size)
            per_group = 64 if rows == 70 else 2 * launch.threads // wave_size
            assert launch.grid[0] == -(-100 // per_group) + -(-101 // per_group)


def test_attention_of_one_row_needs_no_tiles() -> None:
    arguments = AttentionArguments(
        n_heads=9, n_kv_heads=1, head_dim=64, value_dim=64, block_size=16, table_width=33
    )
    kernels = [launch.kernel for launch in launches("attention", arguments, 1, 32)]
    assert kernels == ["attention_vector", "attention_combine"]
    vector, tile, combine = launches("attention", arguments, 6, 32)
    partitions = -(-33 * 16 // kernel_set._PARTITION)
    assert partitions <= kernel_set._PARTITION_STRIDE
    assert vector.grid == (6, 3, partitions)  # nine query heads are three groups
    assert tile.grid[:2] == (3, 9)
    assert combine.grid[:2] == (6, -(-9 * 64 // combine.threads))


def test_scratch_grows_with_sequences_rather_than_rows() -> None:
    few, many = (attention_scratch_bytes(2048, n, 32, 128, 32768) for n in (8, 9))
    assert many - few == 4 * 32 * (32768 // kernel_set._PARTITION) * 130
    assert attention_scratch_bytes(4, 8, 32, 128, 256) == attention_scratch_bytes(4, 4, 32, 128, 256)


def test_what_no_kernel_can_do_is_refused() -> None:
    with pytest.raises(DeviceError, match="at least 1 row, not 0"):
        launches("rms_norm", RmsNormArguments(), 0, 32)
    with pytest.raises(DeviceError, match="heads of 12 and 64 elements must be multiples of 8"):
        launches("attention", AttentionArguments(n_heads=1, n_kv_heads=1, head_dim=12, value_dim=64), 1, 32)
    with pytest.raises(DeviceError, match=r"heads of 512 elements are too large.*holds 256"):
        launches("rope_store", RopeStoreArguments(n_heads=1, n_kv_heads=1, head_dim=512), 1, 32)
