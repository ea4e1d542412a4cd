"""Opens the device that a worker will drive."""

from __future__ import annotations

from typing import Literal

from worker.device.base import Device, DeviceError
from worker.device.cpu import CpuDevice

DeviceKind = Literal["auto", "cpu", "hip", "cuda"]


def open_device(kind: DeviceKind = "auto", n_threads: int | None = None) -> Device:
    """The device of this process.

    Args:
        kind: "auto" takes the best there is: for now the CPU, since devices for GPUs are not written yet.
        n_threads: threads of the CPU device; None for one on each core that this process may use.

    Raises:
        DeviceError: this version has no such device, or it cannot be opened.
    """
    if kind in ("auto", "cpu"):
        return CpuDevice(n_threads)
    if kind in ("hip", "cuda"):
        raise DeviceError(f"this version has no {kind} device yet; use kind 'cpu'")
    raise DeviceError(f"there is no kind of device named {kind!r}; known are 'auto', 'cpu', 'hip' and 'cuda'")
