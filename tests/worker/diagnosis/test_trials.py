"""Examining GPUs in processes of their own, on stand-in GPUs that behave and misbehave."""

from __future__ import annotations

import ctypes.util
import time

import pytest
from support import standin

from redshard.worker.device.sources import source_root
from redshard.worker.diagnosis.trials import (
    Check,
    GpuDiagnosis,
    count_gpus,
    examine_cpu,
    examine_gpu,
    representative_launches,
)

KERNELS = {f"kernel {path.stem}" for path in (source_root() / "hip").glob("*.hip")}
MEMORY = 64 << 20  # little, so that copies are quick


def examine(monkeypatch: pytest.MonkeyPatch, ordinal: int = 0, **settings: str | int) -> GpuDiagnosis:
    standin.activate(monkeypatch, **({"memory": MEMORY} | settings))
    return examine_gpu("hip", ordinal)


def found(diagnosis: GpuDiagnosis, name: str) -> Check:
    return next(check for check in diagnosis.checks if check.name == name)


@pytest.mark.parametrize("wave_size", [32, 64])
def test_every_kernel_source_is_tried(wave_size: int) -> None:
    assert {f"kernel {source}" for source in representative_launches(wave_size)} == KERNELS


def test_a_healthy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = examine(monkeypatch, ordinal=1, devices=3)
    assert not diagnosis.failures
    assert diagnosis.arch == "gfx1100"
    assert found(diagnosis, "device").found["name"] == "Stand-in GPU 1"
    assert found(diagnosis, "versions").found["HIP runtime"] == "7.0.0"
    assert found(diagnosis, "memory").found == {"free": MEMORY, "total": MEMORY}
    assert found(diagnosis, "readback").found["way"] == "direct"
    assert found(diagnosis, "peers").found == {"0": True, "2": True}
    assert {check.name for check in diagnosis.checks} >= KERNELS
    bandwidth = found(diagnosis, "bandwidth").found
    assert bandwidth["nbytes"] == MEMORY // 4
    assert all(bandwidth[way] > 0.01 for way in ("to_device", "within_device", "to_host"))


def test_the_way_of_reading_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = examine(monkeypatch, refuse_view_reads=1)
    assert not diagnosis.failures
    assert found(diagnosis, "readback").found["way"] == "bounce"
    assert "hipErrorInvalidValue" in found(diagnosis, "readback").found["reason"]


def test_checks_go_on_behind_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = examine(monkeypatch, fail_allocation=1)
    (failed,) = diagnosis.failures
    assert failed.name == "readback"
    assert "hipErrorOutOfMemory" in failed.failure
    assert diagnosis.checks[-1].name == "peers"


def test_a_device_that_gets_lost_fails_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (failed,) = examine(monkeypatch, lose_device=1).failures
    assert failed.name == "kernel result"
    assert "hipErrorNoDevice" in failed.failure
    assert failed.answered


def test_a_call_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.activate(monkeypatch, hang_allocation=1)
    start = time.monotonic()
    last = examine_gpu("hip", 0, deadline_s=8).checks[-1]
    assert last == Check("readback", {}, "no answer within 8 s", answered=False)
    assert time.monotonic() - start < 60


def test_a_process_that_ends_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.activate(monkeypatch, memory="none")  # the runtime aborts over a number that is none
    last = examine_gpu("hip", 0).checks[-1]
    assert last.name == "device"
    assert last.failure.startswith("the process ended with SIGABRT: ")
    assert not last.answered


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = examine(monkeypatch, ordinal=5).checks
    assert check == Check("device", {}, "there is no HIP device number 5: the runtime reports 1")


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.activate(monkeypatch, devices=3)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,0")
    assert count_gpus()["hip"] == Check("count", {"count": 2})


@pytest.mark.skipif(ctypes.util.find_library("amdhip64") is not None, reason="there is a HIP runtime")
def test_without_a_runtime_the_library_is_named() -> None:
    count = count_gpus()["hip"]
    assert "libamdhip64.so" in count.failure
    assert count.answered


def test_the_cpu_is_measured() -> None:
    cpu = examine_cpu()
    assert cpu["read_gb_per_s"] > 0.1
    assert cpu["arch"] in cpu["features"]
    assert 0 < cpu["free_memory"] <= cpu["total_memory"]
