"""One Ray instance for all tests of the cluster: starting one takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Actors of the tests' own classes find those in tests/support, as pytest does.
_TESTS = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_TESTS, os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """A local Ray that the tests' models join. Its GPUs exist in Ray's books alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=2, num_gpus=3)
    yield
    ray.shutdown()
