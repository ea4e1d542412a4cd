"""What each kind of device has kernels for: types of tensors, and shapes."""

from __future__ import annotations

from collections.abc import Iterable

from redshard.loader.gguf.gguf_file import TensorInfo
from redshard.loader.gguf.quant_types import QuantType
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.model.tensors import ModelTensors

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

#: Elements of the largest head: more do not fit the local memory that kernels/hip/attention.hip has.
MAX_GPU_HEAD = 256

_DEVICES = {"auto": "on any device", "cpu": "on the CPU", "hip": "on AMD GPUs", "cuda": "on NVIDIA GPUs"}


class UnsupportedOnDeviceError(ValueError):
    """A model has tensors or shapes that the device cannot compute with."""


def check_device_support(
    config: ModelConfig, tensors: ModelTensors, stored: Iterable[TensorInfo], kind: str
) -> None:
    """Refuse a model that a device has no kernels for, before anything is loaded.

    Args:
        config: of the model.
        tensors: by their roles.
        stored: all that the file has.
        kind: of device: "cpu", "hip" or "cuda"; "auto" refuses only what no device has a kernel for.

    Raises:
        UnsupportedOnDeviceError: naming what there is no kernel for, and what can be used instead.
    """
    _check_types(stored, kind)
    if kind in ("hip", "cuda"):
        _check_gpu_shapes(config, tensors, _DEVICES[kind])


def _check_gpu_shapes(config: ModelConfig, tensors: ModelTensors, where: str) -> None:
    attention = [body for layer in config.layers for body in layer.attention]
    for size in sorted({size for body in attention for size in (body.head_dim, body.value_dim)}):
        if size % 8 or size > MAX_GPU_HEAD:
            raise UnsupportedOnDeviceError(
                f"{config.name} has heads of {size} elements; {where} they must be multiples of 8 and at "
                f"most {MAX_GPU_HEAD}: use device 'cpu'"
            )
    for layer in range(config.n_layers):
        gate, up = (tensors.layer_tensors(layer).get(role) for role in ("ffn_gate", "ffn_up"))
        if gate is not None and up is not None and gate.type is not up.type:
            raise UnsupportedOnDeviceError(
                f"{gate.path}: {gate.name!r} has type {gate.type.name}, {up.name!r} {up.type.name}; {where} "
                "there is no kernel for two types in one feed-forward layer: use device 'cpu'"
            )


def _check_types(tensors: Iterable[TensorInfo], kind: str) -> None:
    known = CPU_WEIGHT_TYPES if kind in ("auto", "cpu") else GPU_WEIGHT_TYPES
    for info in tensors:
        if info.type not in known:
            names = ", ".join(quant_type.name for quant_type in QuantType if quant_type in known)
            raise UnsupportedOnDeviceError(
                f"{info.path}: tensor {info.name!r} has type {info.type.name}, for which there is no kernel "
                f"{_DEVICES[kind]}; supported are {names}"
            )
