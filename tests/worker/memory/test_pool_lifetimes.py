"""No view frees memory or outlives it: by example, and by random sequences of everything a caller may do."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from support.fake_device import FakeDevice

from redshard.worker.configuration import PoolSettings
from redshard.worker.memory.packing import plan_packing
from redshard.worker.memory.pool import MemoryPool, PoolError


def test_dropping_views_frees_nothing():
    device = FakeDevice()
    with MemoryPool(device) as pool:
        views = pool.allocate_weights(plan_packing([("a", 10), ("b", 20)], pool.settings))
        live = dict(device.live)
        views["a"].view(0, 5)
        views.clear()
        gc.collect()
        assert device.live == live


def test_a_view_keeps_its_buffer():
    device = FakeDevice()
    pool = MemoryPool(device)
    inner = pool.allocate("x", 4096).view(1024, 512).view(0, 16, "inner")
    gc.collect()
    with pytest.raises(PoolError, match=r"1 views of it are in use \(inner\)"):
        pool.close()
    with pytest.raises(PoolError, match="in use"):
        pool.free(inner.buffer)
    assert pool.read(inner).shape == (16,)
    del inner
    pool.close()
    assert not device.live


def test_views_in_unreachable_cycles_do_not_count():
    pool = MemoryPool(FakeDevice())
    cycle = [pool.allocate("x", 4096).view(0, 16)]
    cycle.append(cycle)
    del cycle
    pool.close()


def test_nothing_touches_memory_after_the_pool_is_closed():
    device = FakeDevice()
    with MemoryPool(device) as pool:
        buffer = pool.allocate("x", 4096)
        view = buffer.view(0, 16)
        host = device.allocate_host(16)
    before = device.allocations
    for use in (
        lambda: buffer.address,
        lambda: buffer.view(0, 16),
        lambda: view.address,
        lambda: view.view(0, 16),
        lambda: pool.read(view),
        lambda: pool.write(view, np.zeros(16, np.uint8)),
        lambda: pool.copy_out(host, view),
        lambda: pool.free(buffer),
        lambda: pool.allocate("y", 16),
        lambda: pool.allocate_group("y", {"part": 16}),
        lambda: pool.allocate_weights(plan_packing([("a", 1)], PoolSettings())),
    ):
        with pytest.raises(PoolError, match=r"closed|freed"):
            use()
    assert device.allocations == before
    pool.close()


def test_a_freed_buffer_is_dead_and_its_name_free_again():
    device = FakeDevice()
    with MemoryPool(device) as pool:
        buffer = pool.allocate("x", 4096)
        pool.free(buffer)
        assert not device.live
        for use in (lambda: buffer.address, lambda: buffer.view(0, 16), lambda: pool.free(buffer)):
            with pytest.raises(PoolError, match="freed"):
                use()
        again = pool.allocate("x", 4096)
        with pytest.raises(PoolError, match="freed or belongs"):
            pool.free(buffer)
        assert again.address in device.live


def test_views_of_another_pool_are_refused():
    with MemoryPool(FakeDevice()) as one, MemoryPool(FakeDevice()) as other:
        view = one.allocate("x", 64).view(0, 64)
        other.allocate("x", 64)
        for use in (
            lambda: other.read(view),
            lambda: other.write(view, np.zeros(64, np.uint8)),
            lambda: other.free(view.buffer),
        ):
            with pytest.raises(PoolError, match="another pool"):
                use()


class PoolMachine(RuleBasedStateMachine):
    """Any caller, beside a model of what is allocated, what is viewed and what the bytes are."""

    buffers = Bundle("buffers")
    views = Bundle("views")

    def __init__(self):
        super().__init__()
        self.device = FakeDevice(refuse_view_reads=True)
        self.pool = MemoryPool(self.device, PoolSettings(segment_bytes="64KiB"))
        self.count = 0
        self.contents = {}  # buffer -> its bytes
        self.held = {}  # view -> its buffer

    def name(self):
        self.count += 1
        return f"buffer {self.count}"

    def know(self, buffer):
        self.contents[buffer] = np.random.default_rng(self.count).integers(0, 256, buffer.nbytes, np.uint8)
        self.pool.write(buffer.view(0, buffer.nbytes), self.contents[buffer])
        return buffer

    @rule(target=buffers, nbytes=st.integers(1, 200_000))
    def allocate(self, nbytes):
        return self.know(self.pool.allocate(self.name(), nbytes))

    @rule(target=buffers, sizes=st.lists(st.integers(1, 5_000), min_size=1, max_size=5))
    def allocate_group(self, sizes):
        views = self.pool.allocate_group(self.name(), {str(i): size for i, size in enumerate(sizes)})
        return self.know(views["0"].buffer)

    @rule(target=views, buffer=buffers, start=st.integers(-20, 300_000), nbytes=st.integers(-20, 300_000))
    def view(self, buffer, start, nbytes):
        return self.take(buffer, buffer, start, nbytes, buffer.nbytes)

    @rule(target=views, view=views, start=st.integers(-20, 1000), nbytes=st.integers(-20, 100_000))
    def view_of_view(self, view, start, nbytes):
        if view is None or view not in self.held:
            return None
        return self.take(view.buffer, view, start, nbytes, view.nbytes)

    def take(self, buffer, parent, start, nbytes, limit):
        if buffer in self.contents and start >= 0 and nbytes >= 1 and start + nbytes <= limit:
            view = parent.view(start, nbytes, alignment=1)
            self.held[view] = buffer
            return view
        with pytest.raises(PoolError):
            parent.view(start, nbytes, alignment=1)
        return None

    @rule(view=consumes(views))
    def drop(self, view):
        self.held.pop(view, None)

    @rule(view=views, seed=st.integers(0, 1000))
    def write(self, view, seed):
        if view in self.held:
            values = np.random.default_rng(seed).integers(0, 256, view.nbytes, np.uint8)
            self.pool.write(view, values)
            self.contents[view.buffer][view.offset : view.offset + view.nbytes] = values

    @rule(view=views)
    def read(self, view):
        if view in self.held:
            expected = self.contents[view.buffer][view.offset : view.offset + view.nbytes]
            np.testing.assert_array_equal(self.pool.read(view), expected)

    @rule(buffer=buffers)
    def free(self, buffer):
        if buffer in self.contents and buffer not in self.held.values() and not buffer.live_views():
            self.pool.free(buffer)
            del self.contents[buffer]
        else:
            with pytest.raises(PoolError):
                self.pool.free(buffer)

    @rule()
    def close_is_refused_while_views_are_held(self):
        if self.held:
            with pytest.raises(PoolError, match="in use"):
                self.pool.close()

    @invariant()
    def exactly_the_unfreed_buffers_are_allocated(self):
        expected = sorted(buffer.nbytes for buffer in self.contents)
        assert sorted(self.device.live.values()) == sorted([*expected, 1 << 20])  # and the bounce buffer

    @invariant()
    def every_view_lies_in_its_live_buffer(self):
        for view, buffer in self.held.items():
            start = buffer.address
            assert start in self.device.live
            assert start <= view.address <= view.address + view.nbytes <= start + self.device.live[start]

    def teardown(self):
        self.pool.__exit__(None, None, None)
        assert not self.device.live
        assert not self.device.host_buffers
        for view in self.held:
            with pytest.raises(PoolError):
                _ = view.address


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
