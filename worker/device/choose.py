"""Opens the device that a worker will drive."""

from __future__ import annotations

import logging
import os
from typing import Literal

from worker.device.base import Device, DeviceError
from worker.device.cpu import CpuDevice

logger = logging.getLogger(__name__)

DeviceKind = Literal["auto", "cpu", "hip", "cuda"]


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
        return _open_hip() if _has_hip() else _open_cuda() if _has_cuda() else CpuDevice(n_threads)
    if kind == "cpu":
        return CpuDevice(n_threads)
    if kind == "hip":
        return _open_hip()
    if kind == "cuda":
        return _open_cuda()
    raise DeviceError(f"there is no kind of device named {kind!r}; known are 'auto', 'cpu', 'hip' and 'cuda'")


def _open_hip() -> Device:
    _check_visible_devices()
    try:
        from worker.device.hip import HipDevice
    except ImportError as error:
        raise DeviceError(f"no hip device: {error}; install hip-python 10 or newer") from None
    return HipDevice()


def _open_cuda() -> Device:
    try:
        from worker.device.cuda import CudaDevice
    except ImportError as error:
        raise DeviceError(f"no cuda device: {error}; install redshard[cuda]") from None
    return CudaDevice()


def _has_hip() -> bool:
    try:
        from worker.device.hip import hip_device_count

        return hip_device_count() > 0
    except (ImportError, DeviceError) as reason:
        logger.info("no AMD GPU: %s", reason)
        return False


def _has_cuda() -> bool:
    try:
        from worker.device.cuda import cuda_device_count

        return cuda_device_count() > 0
    except (ImportError, DeviceError) as reason:
        logger.info("no NVIDIA GPU: %s", reason)
        return False


def _check_visible_devices() -> None:
    """Ray pins a worker to its GPU by HIP_VISIBLE_DEVICES, which then counts among ROCR_VISIBLE_DEVICES.

    Source: https://docs.ray.io/en/latest/ray-core/scheduling/accelerators.html.
    """
    chosen = os.environ.get("ROCR_VISIBLE_DEVICES")
    if chosen is not None and "HIP_VISIBLE_DEVICES" not in os.environ:
        raise DeviceError(
            f"ROCR_VISIBLE_DEVICES={chosen} is set without HIP_VISIBLE_DEVICES, which Ray refuses: "
            "unset ROCR_VISIBLE_DEVICES and choose GPUs by HIP_VISIBLE_DEVICES"
        )
