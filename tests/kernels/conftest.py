"""Native runtimes on every instruction set this machine has, and random numbers that are new in every run."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

import redshard._cpu as _cpu

#: Each instruction set with one thread, and the fastest with several.
RUNTIMES = [(isa, 1) for isa in _cpu.features()] + [("auto", 2), ("auto", 3)]


@pytest.fixture(params=RUNTIMES, ids=lambda param: f"{param[0]}-{param[1]}", scope="session")
def runtime(request: pytest.FixtureRequest) -> _cpu.Runtime:
    isa, n_threads = request.param
    return _cpu.Runtime(n_threads, isa)


@pytest.fixture(scope="session")
def every_runtime() -> list[_cpu.Runtime]:
    return [_cpu.Runtime(n_threads, isa) for isa, n_threads in RUNTIMES]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed of this test's random numbers: {seed}")  # shown when the test fails
    return np.random.default_rng(seed)
