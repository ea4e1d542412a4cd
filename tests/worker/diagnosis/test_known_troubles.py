"""Hints about known troubles, on made-up machines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from redshard.worker.diagnosis.known_troubles import COMPILED_ARCHS, Machine, hints

ROOT = Path(__file__).parents[3]
TOPOLOGY = "sys/class/kfd/kfd/topology/nodes"


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def gpu_files(gfx_target_version: int, kernel: str = "6.12.1-generic", **files: str) -> dict[str, str]:
    return {
        "sys/bus/pci/devices/0000:03:00.0/vendor": "0x1002",
        "sys/bus/pci/devices/0000:03:00.0/class": "0x030000",
        f"{TOPOLOGY}/0/properties": "cpu_cores_count 8\ngfx_target_version 0",
        f"{TOPOLOGY}/1/properties": f"simd_count 192\ngfx_target_version {gfx_target_version}",
        "sys/module/amdgpu/parameters/cwsr_enable": "1",
        "proc/sys/kernel/osrelease": kernel,
        "proc/cmdline": "root=/dev/sda1 quiet",
        "dev/kfd": "",
        **files,
    }


def test_a_machine_without_gpus_has_no_troubles(tmp_path: Path) -> None:
    assert hints(Machine(environment={"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}, root=tmp_path)) == []


@pytest.mark.parametrize(
    ("version", "arch"), [(90_010, "gfx90a"), (90_402, "gfx942"), (100_300, "gfx1030"), (120_001, "gfx1201")]
)
def test_the_driver_knows_architectures(tmp_path: Path, version: int, arch: str) -> None:
    machine = Machine(environment={}, root=make(tmp_path, gpu_files(version)))
    assert machine.known_archs == [arch]
    assert hints(machine) == []


def test_rdna3_hangs(tmp_path: Path) -> None:
    machine = Machine(environment={}, root=make(tmp_path, gpu_files(110_000)))
    (hint,) = hints(machine)
    assert "amdgpu.cwsr_enable=0" in hint
    assert "6.12.1-generic" in hint
    assert hints(Machine(["gfx1100"], environment={}, root=tmp_path / "other"))  # nothing known of the driver
    for files in (
        {"sys/module/amdgpu/parameters/cwsr_enable": "0"},
        {"proc/cmdline": "quiet amdgpu.cwsr_enable=0"},
        {"proc/sys/kernel/osrelease": "6.18.0"},
    ):
        make(tmp_path, gpu_files(110_000) | files)
        assert hints(machine) == []


def test_mes_firmware_that_was_taken_back(tmp_path: Path) -> None:
    files = {"sys/class/drm/card1/device/fw_version/mes_fw_version": "0x00000083"}
    machine = Machine(environment={}, root=make(tmp_path, gpu_files(110_501, "6.19.2", **files)))
    (hint,) = hints(machine)
    assert "0x83" in hint
    make(tmp_path, {"sys/class/drm/card1/device/fw_version/mes_fw_version": "0x00000080"})
    assert hints(machine) == []


def test_no_device_file(tmp_path: Path) -> None:
    root = make(tmp_path, gpu_files(90_402))
    (root / "dev/kfd").unlink()
    (hint,) = hints(Machine(environment={}, root=root))
    assert "--device=/dev/kfd" in hint


def test_a_device_file_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may open everything
    (hint,) = hints(Machine(environment={}, root=make(tmp_path, gpu_files(90_402))))
    assert "render,video" in hint


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ROCR_VISIBLE_DEVICES": "1"}, "Ray refuses"),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, "ROCR_VISIBLE_DEVICES=1, HIP_VISIBLE_"),
        ({"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, "set HIP_VISIBLE_DEVICES alone"),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, ""),
        ({"GPU_DEVICE_ORDINAL": "0", "HIP_VISIBLE_DEVICES": "0"}, "GPU_DEVICE_ORDINAL=0"),
        ({"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}, "HSA_OVERRIDE_GFX_VERSION=10.3.0"),
    ],
)
def test_variables(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    found = hints(Machine(environment=environment, root=make(tmp_path, gpu_files(90_402))))
    assert len(found) == bool(words)
    assert all(words in hint for hint in found)


def test_variables_that_hide_every_gpu(tmp_path: Path) -> None:
    environment = {"HIP_VISIBLE_DEVICES": ""}
    (hint,) = hints(Machine(idle_runtimes=["hip"], environment=environment, root=tmp_path))
    assert hint.startswith("HIP_VISIBLE_DEVICES= is set and leaves no GPU")
    assert hints(Machine(idle_runtimes=["cuda"], environment=environment, root=tmp_path)) == []
    assert hints(Machine(idle_runtimes=["cuda"], environment={"CUDA_VISIBLE_DEVICES": "9"}, root=tmp_path))


def test_architectures_outside_ci(tmp_path: Path) -> None:
    (hint,) = hints(Machine(["gfx1032", "gfx906"], environment={}, root=tmp_path))
    assert hint.startswith("gfx1032 is not among")


def test_the_architectures_are_those_that_ci_compiles_for() -> None:
    source = (ROOT / "tests/hardware/compile_kernels.py").read_text()
    targets = re.search(r"^TARGETS = \((.*)\)$", source, re.MULTILINE)
    assert targets
    assert tuple(re.findall(r"gfx\w+", targets[1])) == COMPILED_ARCHS
