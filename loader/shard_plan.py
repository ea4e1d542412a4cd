"""Which layers go to which device: a pure function of the model's sizes and the devices' memory.

A decode step of a stage reads its weights and its keys and values once, so its time is taken to be those
bytes over the device's bandwidth. The plan is the contiguous split that fits into memory and whose slowest
stage is the fastest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from redshard.loader.gguf.gguf_file import TensorInfo
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.units import BYTE_UNITS, format_bytes

#: Memory of a device that staging buffers and the runtime itself take.
DEFAULT_OVERHEAD_BYTES = 512 << 20
MAX_DEVICES = 1024

_GPUS = re.compile(r"(?:(?P<count>\d{1,6})x)?(?P<size>\d{1,12}(?:\.\d{1,6})?)(?P<unit>[A-Za-z]+)")


class PlanError(ValueError):
    """The model cannot be split over the devices as asked; the message says what would fit."""


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """What the plan needs to know of a device.

    Attributes:
        memory_bytes: what the stage may use of it; its bandwidth is taken to be in proportion.
    """

    memory_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a model's parts in bytes.

    Attributes:
        layers: weights of each layer.
        input: the token embedding; output: the final norm and the output matrix.
        shared: what input and output have in common (tied embeddings), held once if one device has both.
        kv_per_token: what each layer keeps of one token in the cache.
    """

    layers: tuple[int, ...]
    input: int
    output: int
    shared: int
    kv_per_token: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, tensors: ModelTensors) -> ModelSize:
        layers = [tensors.layer_tensors(layer) for layer in range(config.n_layers)]
        inputs, outputs = tensors.input_tensors(), tensors.output_tensors()
        return cls(
            layers=tuple(_nbytes(layer.values()) for layer in layers),
            input=_nbytes(inputs.values()),
            output=_nbytes(outputs.values()),
            shared=_nbytes(info for info in outputs.values() if info in inputs.values()),
            kv_per_token=tuple(layer.cache_bytes for layer in config.layers),
        )


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: layers [first, last) on one device.

    Attributes:
        device: index into the devices given.
        first, last: layers [first, last); none where the stage only embeds tokens or only makes logits.
        weight_bytes: of its layers, and of the embedding or the output matrix where it has them.
        kv_bytes: keys and values of all the tokens asked for.
        kv_tokens: how many tokens' keys and values would fit beside the weights; None without layers.
        free_bytes: left when weights, the tokens asked for, and the overhead are in place.
    """

    device: int
    first: int
    last: int
    weight_bytes: int
    kv_bytes: int
    kv_tokens: int | None
    free_bytes: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A contiguous split of the model, one stage per device, in order."""

    stages: tuple[StagePlan, ...]

    COLUMNS = ("device", "layers", "weights", "KV cache", "KV tokens that fit", "free")

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the cache of every stage."""
        return min(stage.kv_tokens for stage in self.stages if stage.kv_tokens is not None)

    def as_rows(self) -> list[tuple[str, ...]]:
        """A row of text for each stage, under `COLUMNS`."""
        return [
            (
                str(stage.device),
                f"{stage.first}-{stage.last - 1}" if stage.first < stage.last else "none",
                format_bytes(stage.weight_bytes),
                format_bytes(stage.kv_bytes),
                "-" if stage.kv_tokens is None else f"{stage.kv_tokens:,}",
                format_bytes(stage.free_bytes),
            )
            for stage in self.stages
        ]


def plan_shards(
    size: ModelSize,
    devices: Sequence[DeviceBudget],
    kv_tokens: int,
    overhead_bytes: int = DEFAULT_OVERHEAD_BYTES,
) -> ShardPlan:
    """Split a model over devices, the slowest stage as fast as can be.

    The first device may hold nothing but the token embedding and the last one nothing but the output
    matrix; the others have at least one layer each.

    Args:
        size: of the model.
        devices: in the order of the pipeline.
        kv_tokens: tokens the cache must hold, of all sequences together.
        overhead_bytes: what a device needs besides weights and cache.

    Raises:
        PlanError: there are too many devices for the layers, or the model or its cache does not fit.
    """
    if not devices:
        raise PlanError("there is no device to put the model on")
    if len(devices) > len(size.layers) + 2:
        raise PlanError(
            f"{len(devices)} devices are too many for {len(size.layers)} layers, an embedding and an output "
            f"matrix; use at most {len(size.layers) + 2}"
        )
    problem = _Problem(size, devices, overhead_bytes)
    bounds = problem.balance(kv_tokens)
    if bounds is None:
        raise PlanError(problem.explain(kv_tokens))
    return ShardPlan(
        tuple(problem.stage(i, bounds[i], bounds[i + 1], kv_tokens) for i in range(len(devices)))
    )


def parse_gpus(text: str) -> list[DeviceBudget]:
    """Devices from a list such as ``4x16GiB,1x8GiB`` or ``24GiB``.

    Raises:
        PlanError: the text is not such a list.
    """
    devices: list[DeviceBudget] = []
    for item in text.split(","):
        match = _GPUS.fullmatch(item.strip())
        if match is None or match["unit"] not in BYTE_UNITS:
            raise PlanError(
                f"{item.strip()!r} is not a number of GPUs and their memory, such as 4x16GiB or 8GiB"
            )
        count, memory = int(match["count"] or 1), int(float(match["size"]) * BYTE_UNITS[match["unit"]])
        if not memory or not 0 < count <= MAX_DEVICES - len(devices):
            raise PlanError(
                f"{item.strip()!r} must give 1 to {MAX_DEVICES} GPUs, all together, with some memory"
            )
        devices += [DeviceBudget(memory)] * count
    return devices


class _Problem:
    """One model over some devices, for any number of cached tokens."""

    def __init__(self, size: ModelSize, devices: Sequence[DeviceBudget], overhead_bytes: int) -> None:
        self.size = size
        self.devices = devices
        self.overhead_bytes = overhead_bytes
        self.n_layers = len(size.layers)
        self._weights_before = [0, *accumulate(size.layers)]
        self._kv_before = [0, *accumulate(size.kv_per_token)]

    def weight_bytes(self, device: int, first: int, last: int) -> int:
        weights = self._weights_before[last] - self._weights_before[first]
        has_input, has_output = device == 0, device == len(self.devices) - 1
        weights += self.size.input * has_input + self.size.output * has_output
        return weights - self.size.shared * (has_input and has_output)

    def kv_per_token(self, first: int, last: int) -> int:
        return self._kv_before[last] - self._kv_before[first]

    def free_bytes(self, device: int, first: int, last: int, kv_tokens: int) -> int:
        kv_bytes = self.kv_per_token(first, last) * kv_tokens
        used = self.weight_bytes(device, first, last) + kv_bytes + self.overhead_bytes
        return self.devices[device].memory_bytes - used

    def stage(self, device: int, first: int, last: int, kv_tokens: int) -> StagePlan:
        kv_per_token = self.kv_per_token(first, last)
        return StagePlan(
            device=device,
            first=first,
            last=last,
            weight_bytes=self.weight_bytes(device, first, last),
            kv_bytes=kv_per_token * kv_tokens,
            kv_tokens=self.free_bytes(device, first, last, 0) // kv_per_token if kv_per_token else None,
            free_bytes=self.free_bytes(device, first, last, kv_tokens),
        )

    def load(self, device: int, first: int, last: int, kv_tokens: int) -> tuple[float, float]:
        """Time of a decode step and used part of the memory, both relative; what the plan keeps small."""
        read = self._weights_before[last] - self._weights_before[first]
        read += self.kv_per_token(first, last) * kv_tokens
        # Of the token embedding a step reads only a few rows; of the output matrix everything.
        read += self.size.output * (device == len(self.devices) - 1)
        memory = self.devices[device].memory_bytes
        return read / memory, 1 - self.free_bytes(device, first, last, kv_tokens) / memory

    def balance(self, kv_tokens: int) -> list[int] | None:
        """The layers' boundaries of the best split, or None if nothing fits.

        Dynamic programming: the best way to put the first `last` layers on the first `device` + 1 devices
        extends the best way to put some fewer layers on one device less.
        """
        best: dict[int, tuple[tuple[float, float], list[int]]] = {0: ((0.0, 0.0), [0])}
        for device in range(len(self.devices)):
            extended: dict[int, tuple[tuple[float, float], list[int]]] = {}
            for first, (load_before, bounds) in best.items():
                for last in self._ends(device, first):
                    if self.free_bytes(device, first, last, kv_tokens) < 0:
                        break
                    own = self.load(device, first, last, kv_tokens)
                    load = max(load_before[0], own[0]), max(load_before[1], own[1])
                    if last not in extended or load < extended[last][0]:
                        extended[last] = load, [*bounds, last]
            best = extended
        return best[self.n_layers][1] if self.n_layers in best else None

    def _ends(self, device: int, first: int) -> range:
        """Where the device's layers may end; those between the first and the last device have some."""
        last_device = len(self.devices) - 1
        if device == last_device:
            return range(self.n_layers, self.n_layers + 1)
        least = 0 if device == 0 else 1
        return range(first + least, self.n_layers - (last_device - device - 1) + 1)

    def explain(self, kv_tokens: int) -> str:
        """Why `kv_tokens` do not fit, and how many would."""
        size, count = self.size, len(self.devices)
        memory = sum(device.memory_bytes for device in self.devices)
        weights = sum(size.layers) + size.input + size.output - (size.shared if count == 1 else 0)
        kv_bytes = sum(size.kv_per_token) * kv_tokens
        needed = (
            f"the model needs {format_bytes(weights)} for weights, {format_bytes(kv_bytes)} for the keys and "
            f"values of {kv_tokens:,} tokens, {format_bytes(self.overhead_bytes)} of overhead per device; "
            f"{count} {'device has' if count == 1 else 'devices have'} {format_bytes(memory)}"
        )
        if self.balance(0) is None:
            least = self._least_memory()
            return f"{needed}. Not even the weights fit: {count} x {format_bytes(least)} would hold them"
        fitting = 0
        for step in reversed([1 << bit for bit in range(kv_tokens.bit_length())]):
            if self.balance(fitting + step) is not None:
                fitting += step
        return f"{needed}. {fitting:,} tokens would fit: shorten the context or run fewer sequences"

    def _least_memory(self) -> int:
        """The memory with which as many equal devices would hold the weights."""
        low, high = 0, self.overhead_bytes + sum(self.size.layers) + self.size.input + self.size.output
        while low < high:
            middle = (low + high) // 2
            problem = _Problem(self.size, [DeviceBudget(middle)] * len(self.devices), self.overhead_bytes)
            if problem.balance(0) is None:
                low = middle + 1
            else:
                high = middle
        return low


def _nbytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in tensors)
