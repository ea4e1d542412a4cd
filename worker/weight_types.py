"""The tensor types that each kind of device has kernels for."""

from __future__ import annotations

from collections.abc import Iterable

from loader.gguf_file import TensorInfo
from loader.quant_types import QuantType

#: By the GPU kernels: kernels/hip/formats.h.
GPU_WEIGHT_TYPES = (
    QuantType.F32,
    QuantType.F16,
    QuantType.BF16,
    QuantType.Q4_0,
    QuantType.Q8_0,
    QuantType.Q4_K,
    QuantType.Q6_K,
)
#: By the CPU's: kernels/cpu/dequantize.h; everything that GPUs take, and more.
CPU_WEIGHT_TYPES = (
    *GPU_WEIGHT_TYPES,
    QuantType.Q4_1,
    QuantType.Q5_0,
    QuantType.Q5_1,
    QuantType.Q5_K,
)

_DEVICES = {"auto": "on any device", "cpu": "on the CPU", "hip": "on AMD GPUs", "cuda": "on NVIDIA GPUs"}


class WeightTypeError(ValueError):
    """A model has tensors of a type that the device cannot compute with."""


def check_weight_types(tensors: Iterable[TensorInfo], kind: str) -> None:
    """Refuse tensors that a device has no kernel for.

    Args:
        tensors: of a model.
        kind: of device: "cpu", "hip" or "cuda"; "auto" refuses only what no device has a kernel for.

    Raises:
        WeightTypeError: naming the file, the first such tensor, its type and the types that can be used.
    """
    known = CPU_WEIGHT_TYPES if kind in ("auto", "cpu") else GPU_WEIGHT_TYPES
    for info in tensors:
        if info.type not in known:
            names = ", ".join(quant_type.name for quant_type in QuantType if quant_type in known)
            raise WeightTypeError(
                f"{info.path}: tensor {info.name!r} has type {info.type.name}, for which there is no kernel "
                f"{_DEVICES[kind]}; supported are {names}"
            )
