"""The shard plan against exhaustive search, and what it says when the model does not fit."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_models import tiny_config, write_model

from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.shard_plan import DeviceBudget, ModelSize, PlanError, ShardPlan, parse_gpus, plan_shards
from redshard.loader.units import format_bytes

GIB = 1 << 30


def even_model(n_layers: int = 32, layer: int = 100, ends: int = 0) -> ModelSize:
    return ModelSize((layer,) * n_layers, input=ends, output=ends, shared=0, kv_per_token=(4,) * n_layers)


def stage_bytes(
    size: ModelSize, first: int, last: int, kv_tokens: int, overhead: int, ends: tuple[bool, bool]
) -> int:
    """Bytes of layers [first, last); `ends`: whether the stage is the first, whether it is the last."""
    total = sum(size.layers[first:last]) + sum(size.kv_per_token[first:last]) * kv_tokens + overhead
    total += size.input * ends[0] + size.output * ends[1]
    return total - size.shared * all(ends)


def ends_of(n_stages: int) -> list[tuple[bool, bool]]:
    return [(i == 0, i == n_stages - 1) for i in range(n_stages)]


def slowest_step(size: ModelSize, devices: list[DeviceBudget], bounds: list[int], kv_tokens: int) -> float:
    times = []
    stages = zip(devices, itertools.pairwise(bounds), ends_of(len(devices)), strict=True)
    for device, (first, last), (_, is_last) in stages:
        read = sum(size.layers[first:last]) + sum(size.kv_per_token[first:last]) * kv_tokens
        read += size.output * is_last
        times.append(read / device.memory_bytes)
    return max(times)


def check_plan(
    plan: ShardPlan, size: ModelSize, devices: list[DeviceBudget], kv_tokens: int, overhead: int
) -> None:
    assert [stage.device for stage in plan.stages] == list(range(len(devices)))
    assert plan.stages[0].first == 0
    assert plan.stages[-1].last == len(size.layers)
    for before, after in itertools.pairwise(plan.stages):
        assert before.last == after.first
    for stage, device, ends in zip(plan.stages, devices, ends_of(len(devices)), strict=True):
        assert stage.last > stage.first or any(ends)
        used = stage_bytes(size, stage.first, stage.last, kv_tokens, overhead, ends)
        assert stage.free_bytes == device.memory_bytes - used >= 0
        assert stage.weight_bytes + stage.kv_bytes + overhead == used
        if stage.kv_tokens is None:
            assert not sum(size.kv_per_token[stage.first : stage.last])
            continue
        assert stage.kv_tokens >= kv_tokens
        # One token more than it says does not fit.
        most = stage_bytes(size, stage.first, stage.last, stage.kv_tokens, overhead, ends)
        more = stage_bytes(size, stage.first, stage.last, stage.kv_tokens + 1, overhead, ends)
        assert most <= device.memory_bytes < more


@st.composite
def problems(draw: st.DrawFn) -> tuple[ModelSize, list[DeviceBudget], int, int]:
    layers = tuple(draw(st.lists(st.integers(1, 50), min_size=1, max_size=7)))
    output = draw(st.integers(0, 60))
    size = ModelSize(
        layers,
        input=draw(st.integers(0, 60)),
        output=output,
        shared=draw(st.integers(0, output)),
        kv_per_token=tuple(draw(st.lists(st.integers(0, 4), min_size=len(layers), max_size=len(layers)))),
    )
    budgets = st.builds(DeviceBudget, st.integers(1, 300))
    devices = draw(st.lists(budgets, min_size=1, max_size=min(4, len(layers) + 2)))
    return size, devices, draw(st.integers(0, 20)), draw(st.integers(0, 20))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_plan_is_the_best_of_all_splits(problem: tuple[ModelSize, list[DeviceBudget], int, int]) -> None:
    size, devices, kv_tokens, overhead = problem
    fitting = []
    for cuts in itertools.combinations_with_replacement(range(len(size.layers) + 1), len(devices) - 1):
        bounds = [0, *cuts, len(size.layers)]
        stages = list(zip(devices, itertools.pairwise(bounds), ends_of(len(devices)), strict=True))
        if all(
            (last > first or any(ends))
            and stage_bytes(size, first, last, kv_tokens, overhead, ends) <= device.memory_bytes
            for device, (first, last), ends in stages
        ):
            fitting.append(bounds)
    if not fitting:
        with pytest.raises(PlanError):
            plan_shards(size, devices, kv_tokens, overhead)
        return
    plan = plan_shards(size, devices, kv_tokens, overhead)
    check_plan(plan, size, devices, kv_tokens, overhead)
    bounds = [0, *(stage.last for stage in plan.stages)]
    best = min(slowest_step(size, devices, candidate, kv_tokens) for candidate in fitting)
    assert slowest_step(size, devices, bounds, kv_tokens) == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_refusal_names_the_most_tokens_that_fit(
    problem: tuple[ModelSize, list[DeviceBudget], int, int],
) -> None:
    size, devices, kv_tokens, overhead = problem
    try:
        plan_shards(size, devices, kv_tokens, overhead)
    except PlanError as error:
        message = str(error)
    else:
        return
    if "Not even the weights fit" in message:
        with pytest.raises(PlanError):
            plan_shards(size, devices, 0, overhead)
    else:
        fitting = int(message.split(" tokens would fit")[0].split()[-1].replace(",", ""))
        plan_shards(size, devices, fitting, overhead)
        with pytest.raises(PlanError):
            plan_shards(size, devices, fitting + 1, overhead)


def test_equal_devices_share_evenly() -> None:
    plan = plan_shards(even_model(), [DeviceBudget(GIB)] * 4, kv_tokens=10, overhead_bytes=0)
    assert [stage.last - stage.first for stage in plan.stages] == [8, 8, 8, 8]


def test_output_matrix_counts_as_work() -> None:
    plan = plan_shards(even_model(10, ends=400), [DeviceBudget(GIB)] * 2, kv_tokens=0, overhead_bytes=0)
    assert [stage.last - stage.first for stage in plan.stages] == [7, 3]


def test_a_small_device_gets_less() -> None:
    by_memory = plan_shards(even_model(30), [DeviceBudget(16 * GIB), DeviceBudget(8 * GIB)], 0, 0)
    assert [stage.last for stage in by_memory.stages] == [20, 30]


def test_tied_embedding_is_held_once_on_one_device_and_twice_on_two() -> None:
    size = ModelSize((10, 10), input=1000, output=1001, shared=1000, kv_per_token=(1, 1))
    assert plan_shards(size, [DeviceBudget(2000)], 0, 0).stages[0].weight_bytes == 1021
    assert [s.weight_bytes for s in plan_shards(size, [DeviceBudget(2000)] * 2, 0, 0).stages] == [1020, 1001]


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"5 devices are too many for 2 layers.*use at most 4"):
        plan_shards(even_model(2), [DeviceBudget(GIB)] * 5, 0)
    with pytest.raises(PlanError, match="no device"):
        plan_shards(even_model(2), [], 0)
    with pytest.raises(PlanError, match=r"Not even the weights fit: 2 x 1\.6 KiB would hold them"):
        plan_shards(even_model(32), [DeviceBudget(1000)] * 2, 0, 0)
    with pytest.raises(PlanError, match="25 tokens would fit: shorten the context"):
        plan_shards(even_model(2), [DeviceBudget(200)] * 2, 100, 0)


def test_parse_gpus() -> None:
    assert parse_gpus("4x16GiB, 1x8GiB") == [DeviceBudget(16 * GIB)] * 4 + [DeviceBudget(8 * GIB)]
    assert parse_gpus("24GB") == [DeviceBudget(24 * 10**9)]
    assert parse_gpus("2x1.5GiB") == [DeviceBudget(3 * GIB // 2)] * 2


@pytest.mark.parametrize(
    "text",
    ["", "4x", "x16GiB", "4x16", "4x16Gi", "0x16GiB", "4x0GiB", "-1x8GiB", "9999x1GiB", "1GiB,,", "nan"],
)
def test_parse_gpus_refuses(text: str) -> None:
    with pytest.raises(PlanError):
        parse_gpus(text)


def test_rows_and_sizes_are_readable() -> None:
    plan = plan_shards(even_model(4), [DeviceBudget(GIB), DeviceBudget(GIB)], 7, 0)
    assert len(plan.as_rows()) == 2
    assert all(len(row) == len(ShardPlan.COLUMNS) for row in plan.as_rows())
    assert plan.as_rows()[1][1] == "2-3"
    assert plan.kv_tokens == min(stage.kv_tokens for stage in plan.stages)
    assert [format_bytes(n) for n in (5, 2048, 3 << 20, 3 * GIB // 2)] == [
        "5 B",
        "2.0 KiB",
        "3.0 MiB",
        "1.50 GiB",
    ]
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_come_from_the_file(tmp_path: Path, tied: bool) -> None:
    config = tiny_config("qwen2", tied_embeddings=tied)
    with GGUFFile.open(write_model(tmp_path / "m.gguf", config)) as file:
        size = ModelSize.of(config, ModelTensors(config, file))
        total = sum(info.nbytes for info in file.tensors.values())
    assert sum(size.layers) + size.input + size.output - size.shared == total
    assert size.shared == (size.input if tied else 0)
    assert size.kv_per_token == (2 * (32 + 32) * 2,) * 2
