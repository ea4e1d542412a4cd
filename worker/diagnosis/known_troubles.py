"""Known troubles of machines with GPUs, and what to do about each: what no check can find out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from redshard.worker.device.choose import GpuKind, visible_devices_conflict

#: Architectures that CI compiles every kernel for (tests/hardware/compile_kernels.py).
COMPILED_ARCHS = ("gfx906", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201")

#: Each narrows down what the HIP runtime offers; for it, CUDA_VISIBLE_DEVICES is HIP_VISIBLE_DEVICES.
VISIBLE_DEVICES = (
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "HIP_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
)

_AMD_VENDOR = "0x1002"
_GPU_CLASSES = ("0x03", "0x12")  # display controllers, processing accelerators
_FIXED_KERNEL = (6, 18)
_BROKEN_MES = 0x83


@dataclass(frozen=True, slots=True)
class Machine:
    """What the troubles depend on.

    Attributes:
        archs: of AMD GPUs, as far as they could be asked.
        idle_runtimes: kinds of GPU whose runtime is there and offers none.
        environment: variables of the process.
        root: directory in place of "/".
    """

    archs: Collection[str] = ()
    idle_runtimes: Collection[GpuKind] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")

    @property
    def known_archs(self) -> list[str]:
        """`archs`, and those that the kernel driver knows without the runtime."""
        return sorted({*self.archs, *self._archs_of_driver()})

    @property
    def unlisted_archs(self) -> str:
        """Those outside COMPILED_ARCHS."""
        return ", ".join(arch for arch in self.known_archs if arch not in COMPILED_ARCHS)

    @property
    def override(self) -> str:
        """Architecture that the runtime is told to take GPUs for."""
        return self.environment.get("HSA_OVERRIDE_GFX_VERSION", "")

    @property
    def ray_conflict(self) -> str:
        """Why Ray will not start; "" if it will."""
        return visible_devices_conflict(self.environment)

    @property
    def choice(self) -> str:
        """The variables that are set among VISIBLE_DEVICES."""
        return ", ".join(f"{name}={self.environment[name]}" for name in self._chosen())

    @property
    def kernel(self) -> str:
        """Release of the Linux kernel."""
        return self._read("proc/sys/kernel/osrelease") or "an unknown one"

    def has(self, family: str) -> bool:
        """Whether an architecture begins with `family`."""
        return any(arch.startswith(family) for arch in self.known_archs)

    def saves_waves(self) -> bool:
        """Whether compute wave save and restore may be on: the driver's parameter, else the command line."""
        parameter = self._read("sys/module/amdgpu/parameters/cwsr_enable")
        return parameter != "0" and "amdgpu.cwsr_enable=0" not in self._read("proc/cmdline").split()

    def has_old_kernel(self) -> bool:
        """Whether the kernel is older than the one that keeps waves from being saved where that hangs."""
        version = re.match(r"(\d+)\.(\d+)", self.kernel)
        return version is None or (int(version[1]), int(version[2])) < _FIXED_KERNEL

    def has_broken_mes(self) -> bool:
        """Whether a card runs the MES firmware that was taken back."""
        versions = self.root.glob("sys/class/drm/card*/device/fw_version/mes_fw_version")
        return any(_number(self._read(path)) == _BROKEN_MES for path in versions)

    def has_amd_gpu(self) -> bool:
        """Whether there is an AMD GPU on the PCI bus, with or without a driver."""
        return any(
            self._read(device / "vendor") == _AMD_VENDOR
            and self._read(device / "class").startswith(_GPU_CLASSES)
            for device in self.root.glob("sys/bus/pci/devices/*")
        )

    def has_kfd(self) -> bool:
        """Whether there is the device file through which the HIP runtime reaches the driver."""
        return (self.root / "dev/kfd").exists()

    def may_use_kfd(self) -> bool:
        """Whether this user may open it."""
        return os.access(self.root / "dev/kfd", os.R_OK | os.W_OK)

    def chooses_twice(self) -> bool:
        """Whether several variables narrow down the AMD GPUs; two that say the same of HIP are one."""
        chosen = set(self._chosen())
        if self.environment.get("HIP_VISIBLE_DEVICES") == self.environment.get("CUDA_VISIBLE_DEVICES"):
            chosen.discard("CUDA_VISIBLE_DEVICES")
        return len(chosen) > 1 and bool(self.known_archs or self.has_amd_gpu())

    def hides_all(self) -> bool:
        """Whether a runtime offers no GPU, and a variable may be why."""
        return bool("hip" in self.idle_runtimes and self._chosen()) or (
            "cuda" in self.idle_runtimes and "CUDA_VISIBLE_DEVICES" in self.environment
        )

    def _chosen(self) -> list[str]:
        return [name for name in VISIBLE_DEVICES if name in self.environment]

    def _archs_of_driver(self) -> list[str]:
        archs = []
        for path in self.root.glob("sys/class/kfd/kfd/topology/nodes/*/properties"):
            found = re.search(r"^gfx_target_version (\d+)$", self._read(path), re.MULTILINE)
            if found and (version := int(found[1])):  # 0 for processors
                archs.append(f"gfx{version // 10_000}{version // 100 % 100:x}{version % 100:x}")
        return archs

    def _read(self, path: str | Path) -> str:
        """A small file without its last line's end; empty if it cannot be read."""
        try:
            return (self.root / path).read_text().strip()
        except OSError:
            return ""


@dataclass(frozen=True, slots=True)
class Trouble:
    """When it may come, and what to do about it: a format string in which ``m`` is the machine."""

    applies: Callable[[Machine], bool]
    hint: str


TROUBLES = (
    # https://github.com/ROCm/ROCm/issues/5590; for the kernel https://github.com/ROCm/ROCm/issues/5991
    Trouble(
        lambda m: m.has("gfx11") and m.saves_waves() and m.has_old_kernel(),
        "RDNA3 GPUs have hung in their MES firmware while compute waves were saved: boot with "
        "amdgpu.cwsr_enable=0, or with Linux 6.18 or newer (this is {m.kernel})",
    ),
    # https://github.com/ROCm/ROCm/issues/5724
    Trouble(
        lambda m: m.has("gfx115") and m.has_broken_mes(),
        "MES firmware 0x83 makes this GPU hang and was taken back: install another linux-firmware",
    ),
    # https://rocm.docs.amd.com/projects/install-on-linux/en/latest/how-to/docker.html
    Trouble(
        lambda m: m.has_amd_gpu() and not m.has_kfd(),
        "there is an AMD GPU, but no /dev/kfd: load the amdgpu kernel module; "
        "in a container, pass --device=/dev/kfd --device=/dev/dri",
    ),
    # https://rocm.docs.amd.com/projects/install-on-linux/en/latest/install/prerequisites.html
    Trouble(
        lambda m: m.has_kfd() and not m.may_use_kfd(),
        "this user may not open /dev/kfd: join the groups render and video "
        "(sudo usermod -a -G render,video $LOGNAME) and log in again",
    ),
    # https://docs.ray.io/en/latest/ray-core/scheduling/accelerators.html
    Trouble(lambda m: bool(m.ray_conflict), "{m.ray_conflict}"),
    # https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html
    Trouble(
        Machine.hides_all,
        "{m.choice} is set and leaves no GPU: unset it, or name GPUs that are there, from 0",
    ),
    # https://rocm.docs.amd.com/projects/HIP/en/latest/reference/env_variables.html; how numbers can differ:
    # https://github.com/mcmonkeyprojects/SwarmUI/issues/565
    Trouble(
        Machine.chooses_twice,
        "{m.choice} choose among AMD GPUs one after the other, so numbers may miss the GPUs that are "
        "meant: set HIP_VISIBLE_DEVICES alone",
    ),
    # https://github.com/ROCm/TheRock/issues/1719; what goes wrong: https://github.com/ROCm/ROCm/issues/4557
    Trouble(
        lambda m: bool(m.override and m.known_archs),
        "HSA_OVERRIDE_GFX_VERSION={m.override} makes the runtime take a GPU for another: unset it, "
        "kernels are compiled for each GPU's own architecture",
    ),
    # KERNELS.md
    Trouble(
        lambda m: bool(m.unlisted_archs),
        "{m.unlisted_archs} is not among the architectures that all kernels are known to compile for: "
        + ", ".join(COMPILED_ARCHS),
    ),
)


def hints(machine: Machine) -> list[str]:
    """What to do about the troubles that this machine may have."""
    return [trouble.hint.format(m=machine) for trouble in TROUBLES if trouble.applies(machine)]


def _number(text: str) -> int | None:
    """Of sysfs, such as "0x00000083"."""
    try:
        return int(text, 0)
    except ValueError:
        return None
