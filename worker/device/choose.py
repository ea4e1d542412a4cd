"""Opens the device that a worker will drive."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Literal

from redshard.worker.device.base import Device, DeviceError
from redshard.worker.device.cpu import CpuDevice
from redshard.worker.device.gpu import GpuDevice

logger = logging.getLogger(__name__)

GpuKind = Literal["hip", "cuda"]
DeviceKind = Literal["auto", "cpu", "hip", "cuda"]

#: Kinds of GPU in the order in which "auto" looks for them, and whose they are.
GPU_MAKERS: dict[GpuKind, str] = {"hip": "AMD", "cuda": "NVIDIA"}


def open_device(kind: DeviceKind = "auto", n_threads: int | None = None) -> Device:
    """The device of this process: of the GPUs that it may see, the first.

    Args:
        kind: "auto" takes an AMD GPU if the HIP runtime reports one, else an NVIDIA GPU, else the CPU.
        n_threads: threads of the CPU device; None for one on each core that this process may use.

    Raises:
        DeviceError: there is no such device, it cannot be opened, or the variables that choose among AMD GPUs
            contradict each other.
    """
    if kind == "auto":
        kind = next((gpu for gpu in GPU_MAKERS if _is_there(gpu)), "cpu")
    if kind == "cpu":
        return CpuDevice(n_threads)
    if kind not in GPU_MAKERS:
        raise DeviceError(
            f"there is no kind of device named {kind!r}; known are 'auto', 'cpu', 'hip' and 'cuda'"
        )
    if kind == "hip" and (conflict := visible_devices_conflict(os.environ)):
        raise DeviceError(conflict)
    return open_gpu(kind)


def open_gpu(kind: GpuKind, ordinal: int = 0) -> GpuDevice:
    """One of the GPUs that this process may see, by its number among them.

    Raises:
        DeviceError: there is no such GPU, or what it needs is not installed.
    """
    try:
        if kind == "hip":
            from redshard.worker.device.hip import HipDevice

            return HipDevice(ordinal)
        from redshard.worker.device.cuda import CudaDevice

        return CudaDevice(ordinal)
    except ImportError as error:
        raise DeviceError(_not_installed(kind, error)) from None


def gpu_count(kind: GpuKind) -> int:
    """How many GPUs of a kind this process may see.

    Raises:
        DeviceError: what it takes to know is not installed, or does not start.
    """
    try:
        if kind == "hip":
            from redshard.worker.device.hip import hip_device_count

            return hip_device_count()
        from redshard.worker.device.cuda import cuda_device_count

        return cuda_device_count()
    except ImportError as error:
        raise DeviceError(_not_installed(kind, error)) from None


def visible_devices_conflict(environment: Mapping[str, str]) -> str:
    """Why Ray would refuse the variables that choose among AMD GPUs, and what to do; "" if it would not.

    Ray pins a worker to its GPU by HIP_VISIBLE_DEVICES, which then counts among ROCR_VISIBLE_DEVICES.
    Source: https://docs.ray.io/en/latest/ray-core/scheduling/accelerators.html.
    """
    chosen = environment.get("ROCR_VISIBLE_DEVICES")
    if chosen is None or "HIP_VISIBLE_DEVICES" in environment:
        return ""
    return (
        f"ROCR_VISIBLE_DEVICES={chosen} is set without HIP_VISIBLE_DEVICES, which Ray refuses: "
        "unset ROCR_VISIBLE_DEVICES and choose GPUs by HIP_VISIBLE_DEVICES"
    )


def _is_there(kind: GpuKind) -> bool:
    try:
        return gpu_count(kind) > 0
    except DeviceError as reason:
        logger.info("no %s GPU: %s", GPU_MAKERS[kind], reason)
        return False


def _not_installed(kind: GpuKind, error: ImportError) -> str:
    package = "hip-python 10 or newer" if kind == "hip" else "redshard[cuda]"
    return f"no {kind} device: {error}; install {package}"
