"""The native module: refusals, memory, threads, recorded graphs."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.native_ops import Guarded

import redshard._cpu as _cpu
from redshard.worker.device.arguments import (
    KERNEL_ARGUMENTS,
    Activation,
    MatmulArguments,
    RmsNormArguments,
    Step,
)


def norm_arguments(step: Step, x: np.ndarray, weight: np.ndarray, out: Guarded) -> RmsNormArguments:
    return RmsNormArguments(
        step=ctypes.addressof(step),
        x=x.ctypes.data,
        weight=weight.ctypes.data,
        out=Activation(values=out.address),
        width=x.shape[1],
        eps=1e-6,
    )


def test_unknown_kernels_and_wrong_blocks_are_refused() -> None:
    runtime = _cpu.Runtime(1)
    with pytest.raises(ValueError, match="unknown kernel 'rms'"):
        runtime.launch("rms", b"")
    for name, structure in KERNEL_ARGUMENTS.items():
        block = bytes(structure())
        with pytest.raises(ValueError, match=f"{name}: argument block of {len(block) - 8} bytes"):
            runtime.launch(name, block[:-8])
        with pytest.raises(ValueError, match=f"^{name}: "):  # all pointers are null
            runtime.launch(name, block)
        with pytest.raises(ValueError, match=f"^{name}: "):
            runtime.record([(name, block)])
        with pytest.raises(ValueError, match=f"^{name}: "):
            _cpu.check(name, block)


@pytest.mark.parametrize("n_matrices", [0, -1, 4])
def test_number_of_matrices_is_checked(n_matrices: int) -> None:
    memory = np.zeros(64, np.float32)
    block = MatmulArguments(step=memory.ctypes.data, width=32, n_matrices=n_matrices)
    with pytest.raises(ValueError, match="1 to 3 matrices"):
        _cpu.check("matmul", bytes(block))


def test_runtimes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="n_threads"):
        _cpu.Runtime(0)
    with pytest.raises(ValueError, match="'mmx' is not available here; these are: auto, portable"):
        _cpu.Runtime(1, "mmx")


def test_auto_is_the_last_of_the_features() -> None:
    assert _cpu.features()[0] == "portable"
    assert _cpu.Runtime(1).isa == _cpu.features()[-1]


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 5_000_001])
@pytest.mark.parametrize("alignment", [1, 256, 4096, 1 << 21])
def test_memory_is_aligned_zeroed_and_usable_to_its_end(nbytes: int, alignment: int) -> None:
    address = _cpu.allocate(nbytes, alignment)
    assert address % max(alignment, 256) == 0
    memory = (
        np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8) if nbytes else np.empty(0)
    )
    assert not memory.any()
    if nbytes:
        ctypes.memset(address, 1, nbytes)
    _cpu.free(address)
    with pytest.raises(ValueError, match="not the address of an allocation"):
        _cpu.free(address)


def test_memory_requests_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        _cpu.allocate(8, 24)
    for nbytes in (2**64 - 1, 2**64 - 4096, 2**62):
        with pytest.raises(MemoryError):
            _cpu.allocate(nbytes, 256)


def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    address = _cpu.allocate(64 << 20, 256)
    ctypes.memset(address, 1, 64 << 20)
    assert resident() - before > 60 << 20
    _cpu.free(address)
    assert resident() - before < 8 << 20


def test_a_graph_reads_the_step_when_it_is_replayed(runtime: _cpu.Runtime, rng: np.random.Generator) -> None:
    x, weight = rng.standard_normal((300, 64), np.float32), np.ones(64, np.float32)
    once, twice = Guarded((300, 64)), Guarded((300, 64))
    step = Step(0, 0, 0, 0)
    first = norm_arguments(step, x, weight, once)
    second = norm_arguments(step, once.array, weight * 2, twice)
    doubled = weight * 2
    second.weight = doubled.ctypes.data
    graph = runtime.record([("rms_norm", bytes(first)), ("rms_norm", bytes(second))])
    for n_tokens in (0, 1, 300):
        step.n_tokens = n_tokens
        graph.replay()
        assert np.isfinite(twice.checked()[:n_tokens]).all()
        assert np.isnan(twice.array[n_tokens:]).all()
    np.testing.assert_allclose(twice.array, 2 * once.array, rtol=1e-5)


def test_a_graph_keeps_its_runtime() -> None:
    x, weight, out = np.ones((1, 32), np.float32), np.ones(32, np.float32), Guarded((1, 32))
    step = Step(1, 1, 0, 0)
    graph = _cpu.Runtime(2).record([("rms_norm", bytes(norm_arguments(step, x, weight, out)))])
    graph.replay()
    np.testing.assert_allclose(out.checked(), 1, rtol=1e-5)


def test_many_small_loops_from_several_python_threads(rng: np.random.Generator) -> None:
    runtime = _cpu.Runtime(3)
    x, weight = rng.standard_normal((600, 32), np.float32), np.ones(32, np.float32)
    step = Step(600, 1, 0, 0)
    outs = [Guarded(x.shape) for _ in range(3)]

    def run(out: Guarded) -> None:
        graph = runtime.record([("rms_norm", bytes(norm_arguments(step, x, weight, out)))] * 20)
        for _ in range(20):
            out.array[:] = np.nan
            graph.replay()
            assert np.isfinite(out.array).all()

    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        np.testing.assert_array_equal(out.checked(), outs[0].array)


def test_idle_threads_use_no_time() -> None:
    runtime = _cpu.Runtime(4)
    x, weight = np.ones((600, 32), np.float32), np.ones(32, np.float32)
    out, step = Guarded(x.shape), Step(600, 1, 0, 0)
    runtime.launch("rms_norm", bytes(norm_arguments(step, x, weight, out)))
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.05
