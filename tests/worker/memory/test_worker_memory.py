"""A worker's peak resident memory: weights are never expanded, nor kept twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from support.gguf_models import tiny_config, write_model
from support.stages import LIMITS, CachedSequence, Pipeline

from redshard.loader.gguf.quant_types import QuantType


def test_peak_resident_memory(tmp_path: Path) -> None:
    config = tiny_config(
        "llama",
        n_layers=8,
        n_embd=2048,
        head_dim=128,
        n_heads=16,
        n_kv_heads=4,
        n_ff=8192,
        context_length=4096,
    )
    path = write_model(tmp_path / "model.gguf", config, QuantType.Q4_0)
    run = subprocess.run(
        [sys.executable, __file__, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(run.stdout)
    assert figures["weight_bytes"] > 200 << 20
    assert figures["peak"] > figures["weight_bytes"], "the kernels read the weights somewhere"
    assert figures["peak"] < 1.15 * (figures["weight_bytes"] + figures["kv_bytes"]) + (300 << 20)


def _run_and_report(path: Path) -> None:
    """Prefill and decode, then print the figures and this process's peak resident memory in bytes."""
    with Pipeline(path, limits=replace(LIMITS, n_kv_blocks=64)) as pipeline:
        sequence = CachedSequence()
        pipeline.logits((sequence, list(range(LIMITS.max_tokens))))
        pipeline.logits((sequence, [1]))
        stats = asdict(pipeline.workers[0].stats())
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({**stats, "peak": peak * 1024}))


if __name__ == "__main__":
    _run_and_report(Path(sys.argv[1]))
