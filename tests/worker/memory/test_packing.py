"""Plans for segments: bounds on their number and padding, for real models and for any sizes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tensor_lists import llama_3_8b_q4_k, qwen_2_5_0_5b_q8_0

from redshard.worker.configuration import PoolSettings
from redshard.worker.memory.packing import PackingPlan, align_up, plan_packing
from redshard.worker.memory.pool import PoolError

GIB = 1 << 30


def placed(plan: PackingPlan) -> dict[str, int]:
    return {p.name: p.nbytes for segment in plan.segments for p in segment.placements}


@pytest.mark.parametrize("tensors", [llama_3_8b_q4_k(), qwen_2_5_0_5b_q8_0()], ids=["llama", "qwen"])
@pytest.mark.parametrize("segment_bytes", ["64MiB", "256MiB", "1GiB"])
def test_real_models_take_few_segments_and_little_padding(tensors, segment_bytes):
    settings = PoolSettings(segment_bytes=segment_bytes)
    plan = plan_packing(tensors, settings)
    weights = sum(nbytes for _, nbytes in tensors)
    assert placed(plan) == dict(tensors)
    assert len(plan.segments) <= math.ceil(weights / settings.segment_bytes) + 1
    assert plan.nbytes == weights + plan.padding
    assert plan.padding < 0.01 * weights


def test_tensor_list_sizes_are_those_of_the_published_models():
    assert len(llama_3_8b_q4_k()) == 291
    assert len(qwen_2_5_0_5b_q8_0()) == 290
    assert 4.5e9 < sum(nbytes for _, nbytes in llama_3_8b_q4_k()) < 4.8e9
    assert 5.2e8 < sum(nbytes for _, nbytes in qwen_2_5_0_5b_q8_0()) < 5.4e8


@pytest.mark.parametrize("share", [0.34, 0.51, 0.67, 1.0, 1.01])
def test_awkward_sizes_still_meet_the_bound(share):
    settings = PoolSettings(segment_bytes="16MiB")
    size = int(share * settings.segment_bytes)
    plan = plan_packing([(f"expert {i}", size) for i in range(40)], settings)
    assert len(plan.segments) <= math.ceil(40 * size / settings.segment_bytes) + 1


@given(
    sizes=st.lists(st.integers(1, 3 << 20), max_size=60),
    segment=st.integers(64 << 10, 2 << 20),
    alignment=st.sampled_from([256, 4096, 65536]),
)
def test_any_sizes_are_placed_apart_aligned_and_within_the_bound(sizes, segment, alignment):
    tensors = [(f"t{i}", nbytes) for i, nbytes in enumerate(sizes)]
    plan = plan_packing(tensors, PoolSettings(segment_bytes=segment, alignment=alignment))
    assert placed(plan) == dict(tensors)
    padded = sum(align_up(nbytes, alignment) for nbytes in sizes)
    assert len(plan.segments) <= math.ceil(padded / segment) + 1
    assert plan.nbytes == padded
    for part in plan.segments:
        end = 0
        for placement in part.placements:
            assert placement.offset % alignment == 0
            assert placement.offset >= end
            end = placement.offset + placement.nbytes
        assert end <= part.nbytes
        assert part.nbytes <= 2 * segment or len(part.placements) == 1


def test_largest_come_first_and_the_plan_does_not_depend_on_the_order_given():
    tensors = llama_3_8b_q4_k()
    plan = plan_packing(tensors, PoolSettings())
    assert plan == plan_packing(tensors[::-1], PoolSettings())
    assert plan.segments[0].placements[0].name == "output.weight"


def test_a_large_tensor_has_a_segment_of_its_own_size():
    plan = plan_packing([("small", 5000), ("large", 3 * GIB + 1)], PoolSettings())
    assert [segment.nbytes for segment in plan.segments] == [3 * GIB + 4096, 8192]


def test_bad_lists_are_refused():
    with pytest.raises(PoolError, match="two tensors are named 'a'"):
        plan_packing([("a", 1), ("a", 2)], PoolSettings())
    for nbytes in (0, -1):
        with pytest.raises(PoolError, match=f"'a' has {nbytes} bytes"):
            plan_packing([("a", nbytes)], PoolSettings())


def test_nothing_takes_nothing():
    plan = plan_packing([], PoolSettings())
    assert plan.segments == ()
    assert "0 segments" in str(plan)


def test_the_plan_prints_segments_and_totals():
    text = str(plan_packing(llama_3_8b_q4_k(), PoolSettings()))
    assert text.count("segment ") == 5
    assert "in 5 segments" in text
