"""Devices for tests: stand-in AMD GPUs, and an NVIDIA GPU where there is one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest
from support import standin
from support.gpu_memory import GpuMemory

from redshard.worker.device.base import DeviceError
from redshard.worker.device.choose import open_device
from redshard.worker.device.gpu import GpuDevice

#: Kinds of GPU; those on the stand-in by architecture: with 32 and with 64 lanes a wave.
GPUS = ["gfx1100", "gfx942", "cuda"]


@pytest.fixture(scope="module", params=GPUS)
def gpu(request: pytest.FixtureRequest) -> Iterator[GpuDevice]:
    """A GPU that behaves."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param != "cuda":
            standin.activate(monkeypatch, arch=request.param)
        try:
            device = open_device("cuda" if request.param == "cuda" else "hip")
        except DeviceError as error:
            pytest.skip(str(error))
        assert isinstance(device, GpuDevice)
        yield device
        device.close()


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed of this test's random numbers: {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def module_memory(gpu: GpuDevice) -> GpuMemory:
    return GpuMemory(gpu)


@pytest.fixture
def memory(module_memory: GpuMemory) -> GpuMemory:
    """Arrays in the memory of that GPU, none left of the test before."""
    module_memory.clear()
    return module_memory
