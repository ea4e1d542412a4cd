"""`set_tables`: as many changes as the step has."""

from __future__ import annotations

import numpy as np
import pytest
from support import native_ops

import redshard._cpu as _cpu


@pytest.mark.parametrize("n_changes", [0, 1, 700])
def test_set_tables(runtime: _cpu.Runtime, rng: np.random.Generator, n_changes: int) -> None:
    tables = rng.integers(0, 1 << 20, 900).astype(np.int32)
    changes = np.stack([rng.permutation(900)[:800], rng.integers(0, 1 << 20, 800)], axis=1).astype(np.int32)
    out = native_ops.set_tables(runtime, tables, changes, n_changes)
    tables[changes[:n_changes, 0]] = changes[:n_changes, 1]
    np.testing.assert_array_equal(out, tables)
