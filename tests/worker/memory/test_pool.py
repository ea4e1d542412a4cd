"""Buffers and views, reading back on runtimes that cannot copy from views, failures, and the memory map."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
from support.fake_device import FakeDevice
from support.tensor_lists import llama_3_8b_q4_k, qwen_2_5_0_5b_q8_0

from redshard.worker.configuration import PoolSettings
from redshard.worker.device.base import DeviceError
from redshard.worker.memory.packing import plan_packing
from redshard.worker.memory.pool import MemoryPool, PoolError

SMALL = PoolSettings(segment_bytes="64KiB")
TENSORS = [("a", 70_001), ("b", 33_333), ("c", 20_000), ("d", 7), ("e", 9_999)]


def random_bytes(nbytes):
    return np.random.default_rng().integers(0, 256, nbytes, np.uint8)


def allocate_worker(pool, tensors):
    """What a stage allocates: its weights and the rest."""
    views = pool.allocate_weights(plan_packing(tensors, pool.settings))
    pool.allocate("inputs", 40_000)
    pool.allocate_group("activations", {"hidden": 100_000, "logits": 70_001, "sampled": 64})
    pool.allocate("rotary table", 8_192)
    pool.allocate_group("kv cache", {f"layer {i} {kind}": 4_096 for i in range(32) for kind in "kv"})
    return views


@pytest.mark.parametrize("tensors", [llama_3_8b_q4_k(), qwen_2_5_0_5b_q8_0()], ids=["llama", "qwen"])
@pytest.mark.parametrize("refuse", [False, True])
def test_a_worker_makes_few_allocations(tensors, refuse):
    device = FakeDevice(refuse_view_reads=refuse)
    with MemoryPool(device) as pool:
        allocate_worker(pool, tensors)
        weights = sum(nbytes for _, nbytes in tensors)
        assert device.allocations <= math.ceil(weights / (1 << 30)) + 8
        assert pool.memory_map().allocations == device.allocations
    assert not device.live
    assert not device.host_buffers


# Readback


@pytest.mark.parametrize(
    ("policy", "fault"),
    [
        ("direct", ""),
        *itertools.product(["probe", "bounce"], ["", "refuse_view_reads", "corrupt_view_reads"]),
    ],
)
def test_views_are_read_whatever_the_runtime_does(policy, fault):
    device = FakeDevice(**{fault: True} if fault else {})
    settings = PoolSettings(segment_bytes="64KiB", readback=policy)
    contents = {name: random_bytes(nbytes) for name, nbytes in [*TENSORS, ("large", 2_500_000)]}
    with MemoryPool(device, settings) as pool:
        plan = plan_packing([(name, values.nbytes) for name, values in contents.items()], settings)
        views = pool.allocate_weights(plan)
        for name, values in contents.items():
            pool.write(views[name], values)
        for name, values in contents.items():
            np.testing.assert_array_equal(pool.read(views[name]), values)
        part = views["large"].view(7, 1_200_000, alignment=1)
        np.testing.assert_array_equal(pool.read(part), contents["large"][7:1_200_007])


@pytest.mark.parametrize(
    ("policy", "faults", "expected"),
    [
        ("probe", {}, "direct: the probe succeeded"),
        ("probe", {"refuse_view_reads": True}, "bounce: .*hipErrorInvalidValue"),
        ("probe", {"corrupt_view_reads": True}, "bounce: wrong bytes"),
        ("direct", {"refuse_view_reads": True}, "direct: configured"),
        ("bounce", {}, "bounce: configured"),
    ],
)
def test_the_policy_decides_and_the_probe_finds_out(policy, faults, expected):
    with MemoryPool(FakeDevice(**faults), PoolSettings(readback=policy)) as pool:
        assert re.match(expected, pool.readback)


def test_direct_on_a_runtime_that_refuses_is_an_error_and_whole_buffers_still_work():
    with MemoryPool(FakeDevice(refuse_view_reads=True), PoolSettings(readback="direct")) as pool:
        buffer = pool.allocate("x", 4096)
        with pytest.raises(DeviceError, match="InvalidValue"):
            pool.read(buffer.view(256, 256))
        assert pool.read(buffer.view(0, 4096)).shape == (4096,)


@pytest.mark.parametrize("refuse", [False, True])
def test_copy_out_is_asynchronous_ordered_and_can_be_recorded(refuse):
    device = FakeDevice(refuse_view_reads=refuse)
    with MemoryPool(device) as pool:
        view = pool.allocate("x", 3_000_000).view(256, 2_500_000)
        host = device.allocate_host(2_500_100)
        graphs = []
        with device.recording(graphs):
            pool.copy_out(host, view, offset=100)
        for _ in range(2):
            values = random_bytes(view.nbytes)
            pool.write(view, values)
            graphs[0].replay()
            device.synchronize()
            np.testing.assert_array_equal(host.array[100:], values)
        for offset in (101, -1):
            with pytest.raises(PoolError):
                pool.copy_out(host, view, offset)
        device.free_host(host)


# Ranges

BAD_RANGES = [
    (-16, 16, "must not be negative"),
    (0, 0, "at least 1"),
    (0, -1, "at least 1"),
    (0, 4097, "past the end, 4096"),
    (4096, 1, "past the end, 4096"),
    (4080, 17, "past the end"),
    (1 << 62, 1 << 62, "past the end"),
    ((1 << 64) - 16, 32, "past the end"),
    (16, (1 << 64) - 16, "past the end"),
    (8, 16, "not a multiple of 16"),
    (1.0, 16, "must be integers"),
    (0, "16", "must be integers"),
    (None, 16, "must be integers"),
]


@pytest.mark.parametrize(("offset", "nbytes", "message"), BAD_RANGES)
@pytest.mark.parametrize("nested", [False, True])
def test_every_bad_range_is_refused(offset, nbytes, message, nested):
    with MemoryPool(FakeDevice()) as pool:
        buffer = pool.allocate("x", 4096 if not nested else 8192)
        whole = buffer.view(4096, 4096) if nested else buffer
        with pytest.raises(PoolError, match=message):
            whole.view(offset, nbytes, "bad")
        assert not [view for view in buffer.live_views() if view.name == "bad"]


def test_good_ranges():
    with MemoryPool(FakeDevice()) as pool:
        buffer = pool.allocate("x", 4096)
        view = buffer.view(np.int64(1024), np.int32(2048), "outer")
        inner = view.view(32, 2016)
        assert (view.address, view.nbytes) == (buffer.address + 1024, 2048)
        assert (inner.address, inner.name, inner.buffer) == (buffer.address + 1056, "outer", buffer)
        assert buffer.view(4095, 1, alignment=1).nbytes == 1
        with pytest.raises(PoolError, match="not a multiple of 512"):
            view.view(256, 16, alignment=512)


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 63, 1 << 70])
def test_absurd_allocations_never_reach_the_device(nbytes):
    device = FakeDevice()
    with MemoryPool(device) as pool:
        before = device.allocations
        with pytest.raises(PoolError, match="cannot allocate"):
            pool.allocate("x", nbytes)
        with pytest.raises(PoolError, match=r"at least one|cannot allocate"):
            pool.allocate_group("x", {"part": nbytes})
        assert device.allocations == before


def test_names_are_unique():
    with MemoryPool(FakeDevice()) as pool:
        pool.allocate("x", 16)
        with pytest.raises(PoolError, match="already an allocation named 'x'"):
            pool.allocate("x", 16)


def test_writes_of_another_size_are_refused():
    with MemoryPool(FakeDevice()) as pool:
        view = pool.allocate("x", 64).view(0, 64)
        with pytest.raises(PoolError, match="60 bytes into 'x' of 64"):
            pool.write(view, np.zeros(15, np.float32))
        pool.write(view, np.arange(32, dtype=np.float32)[::2].reshape(4, 4))
        np.testing.assert_array_equal(pool.read(view).view(np.float32), np.arange(32, dtype=np.float32)[::2])


# Failures


@pytest.mark.parametrize("readback", ["probe", "bounce"])
def test_whichever_allocation_fails_nothing_is_leaked(readback):
    settings = SMALL.model_copy(update={"readback": readback})
    device = FakeDevice()
    with MemoryPool(device, settings) as pool:
        allocate_worker(pool, TENSORS)
    for number in range(1, device.allocations + 1):
        failing = FakeDevice(failing_allocation=number)
        with (
            pytest.raises(PoolError, match=r"out of memory.* are free"),
            MemoryPool(failing, settings) as pool,
        ):
            allocate_worker(pool, TENSORS)
        assert failing.allocations == number
        assert not failing.live
        assert not failing.host_buffers


def test_a_failed_plan_leaves_none_of_its_segments_and_can_be_tried_again():
    device = FakeDevice(failing_allocation=3)
    with MemoryPool(device, SMALL.model_copy(update={"readback": "direct"})) as pool:
        plan = plan_packing(TENSORS, SMALL)
        assert len(plan.segments) == 3
        with pytest.raises(
            PoolError, match=r"'weights 3/3' \(.*KiB, allocation 3\).*out of memory"
        ) as caught:
            pool.allocate_weights(plan)
        assert isinstance(caught.value.__cause__, DeviceError)
        assert not device.live
        assert pool.allocate_weights(plan).keys() == dict(TENSORS).keys()


def test_a_device_that_fails_to_free_is_reported_after_everything_was_tried(monkeypatch):
    device = FakeDevice()
    pool = MemoryPool(device)
    kept = pool.allocate("x", 16).address
    pool.allocate("y", 16)
    free = device.free

    def failing_free(address):
        if address == kept:
            raise DeviceError("free: device lost")
        free(address)

    monkeypatch.setattr(device, "free", failing_free)
    with pytest.raises(DeviceError, match="device lost"):
        pool.close()
    assert list(device.live) == [kept]
    assert not device.host_buffers
    pool.close()


# The map


def test_the_map_accounts_for_every_byte():
    device = FakeDevice(refuse_view_reads=True)
    with MemoryPool(device, SMALL) as pool:
        views = allocate_worker(pool, TENSORS)
        extra = pool.allocate("extra", 1 << 20)
        peak = sum(device.live.values())
        pool.free(extra)
        memory = pool.memory_map()
        assert memory.allocated_bytes == sum(device.live.values()) == peak - (1 << 20)
        assert memory.peak_bytes == peak
        assert memory.allocations == device.allocations
        assert memory.peak_allocations == len(device.live) + 1
        for segment in memory.segments:
            used = sum(part.nbytes for part in segment.parts)
            assert used + segment.padding + sum(free.nbytes for free in segment.free) == segment.nbytes
        parts = {part.name: part.nbytes for segment in memory.segments for part in segment.parts}
        assert parts.items() >= {(name, view.nbytes) for name, view in views.items()}
        assert json.loads(json.dumps(memory.to_dict()))["segments"][0]["name"] == "readback"
        for segment in memory.segments:
            assert segment.name in str(memory)


def test_gaps_of_a_segment_are_padding_or_free():
    with MemoryPool(FakeDevice()) as pool:
        pool.allocate_group("x", {"a": 100, "b": 256})
        (segment,) = (s for s in pool.memory_map().segments if s.name == "x")
        assert (segment.nbytes, segment.padding, segment.free) == (512, 156, ())
