"""One worker: a device, its memory pool and the stage it runs. Knows nothing of Ray or of other workers."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from redshard.loader.gguf.gguf_file import GGUFError, GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.units import format_bytes
from redshard.worker.configuration import WorkerConfiguration
from redshard.worker.device.base import Device
from redshard.worker.memory.packing import plan_packing
from redshard.worker.memory.pool import MemoryMap, MemoryPool
from redshard.worker.memory.upload import Progress, upload
from redshard.worker.model.handoff import HandoffType
from redshard.worker.model.stage import Stage
from redshard.worker.model.step_inputs import StepLimits
from redshard.worker.model.weights import StagePart, StageWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What a loaded worker holds and has done.

    Attributes:
        device: name of the device; kind: "cpu", "hip" or "cuda".
        first_layer, end_layer: the stage is layers [first_layer, end_layer).
        n_kv_blocks: blocks of the cache, of `block_size` tokens each.
        weight_bytes: of the stage's tensors; kv_bytes: of its cache.
        other_bytes: device memory that is neither: padding, activations, inputs, rotary table.
        weight_bytes_per_token: weights that one decoded token reads.
        load_s: seconds that loading took.
        steps, tokens: steps run and tokens in them since loading.
        busy_s: seconds spent in steps.
        sends_by: how hidden states leave, if they do: by "device memory" or "host memory".
    """

    device: str
    kind: str
    first_layer: int
    end_layer: int
    n_kv_blocks: int
    block_size: int
    weight_bytes: int
    kv_bytes: int
    other_bytes: int
    weight_bytes_per_token: int
    load_s: float
    steps: int
    tokens: int
    busy_s: float
    sends_by: str


class Worker:
    """Drives one device; one thread at a time may use it.

    Args:
        device: closed together with the worker.
        configuration: of pool, upload and deadlines.
    """

    def __init__(self, device: Device, configuration: WorkerConfiguration | None = None) -> None:
        self.device = device
        self._configuration = configuration or WorkerConfiguration()
        self._pool = MemoryPool(device, self._configuration.pool, self._configuration.deadlines)
        self._stage: Stage | None = None
        self._stats: WorkerStats | None = None

    def load(
        self,
        path: Path | str,
        part: StagePart,
        limits: StepLimits,
        *,
        handoff: HandoffType = "float32",
        fingerprint: str | None = None,
        progress: Progress | None = None,
    ) -> WorkerStats:
        """Upload a part of a model and record its steps. After an error the worker can only be closed.

        Args:
            path: the model; of a split set, any of its files.
            part: what this worker has of the model.
            limits: the largest step. `n_kv_blocks` is the size of the cache.
            handoff: element type of hidden states between stages.
            fingerprint: of the model that is expected (`GGUFFile.fingerprint`); None takes any.
            progress: called with (bytes uploaded, bytes in total).

        Raises:
            GGUFError, UnsupportedModelError: the file cannot be used, or is another one than expected.
            ValueError: the worker is loaded already, or the model has no such part.
            PoolError, UploadError, DeviceError: it does not fit, cannot be read, or the device failed.
        """
        if self._stage is not None:
            raise ValueError("this worker has loaded a model already")
        started = time.monotonic()
        with GGUFFile.open(path) as file:
            config = read_config(file)
            tensors = ModelTensors(config, file)
            part.check(config.n_layers)
            if fingerprint is not None and file.fingerprint() != fingerprint:
                raise GGUFError(
                    file.path,
                    "has changed since the model was opened; put the old file back, or load it anew",
                )
            freq_factors = _freq_factors(file, tensors)
        stored = part.tensors(tensors)
        packing = plan_packing([(info.name, info.nbytes) for info in stored], self._configuration.pool)
        views = self._pool.allocate_weights(packing)
        upload(self._pool, stored, views, self._configuration.upload, progress)
        weights = StageWeights.loaded(config, tensors, part, views)
        self._stage = Stage(
            self._pool, weights, limits, freq_factors, handoff, self._configuration.check_finite
        )
        self._stats = self._loaded_stats(tensors, part, limits, time.monotonic() - started)
        logger.info(
            "loaded layers [%d, %d) of %s: %s of weights, %d cache blocks, in %.1f s",
            part.layers.start,
            part.layers.stop,
            path,
            format_bytes(self._stats.weight_bytes),
            limits.n_kv_blocks,
            self._stats.load_s,
        )
        return self._stats

    @property
    def stage(self) -> Stage:
        """What runs steps. Raises ValueError before a model is loaded."""
        if self._stage is None:
            raise ValueError("this worker has not loaded a model")
        return self._stage

    def memory_map(self) -> MemoryMap:
        """What is allocated on the device; makes no device call."""
        return self._pool.memory_map()

    def stats(self) -> WorkerStats:
        """Sizes, and work done so far. Raises ValueError before a model is loaded."""
        if self._stats is None:
            raise ValueError("this worker has not loaded a model")
        return replace(
            self._stats,
            steps=self.stage.steps,
            tokens=self.stage.tokens,
            busy_s=self.stage.busy_s,
            sends_by=self.stage.handoff.sends_by,
        )

    def close(self) -> None:
        """Wait for the device and free everything. Idempotent."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None
        self._pool.close()
        self.device.close()

    def _loaded_stats(
        self, tensors: ModelTensors, part: StagePart, limits: StepLimits, load_s: float
    ) -> WorkerStats:
        weight_bytes = sum(info.nbytes for info in part.tensors(tensors))
        kv_bytes = self.stage.cache_bytes
        return WorkerStats(
            device=self.device.properties.name,
            kind=self.device.kind,
            first_layer=part.layers.start,
            end_layer=part.layers.stop,
            n_kv_blocks=limits.n_kv_blocks,
            block_size=limits.block_size,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            other_bytes=self._pool.memory_map().allocated_bytes - weight_bytes - kv_bytes,
            weight_bytes_per_token=part.bytes_per_token(tensors),
            load_s=load_s,
            steps=0,
            tokens=0,
            busy_s=0.0,
            sends_by="host memory",
        )


def _freq_factors(file: GGUFFile, tensors: ModelTensors) -> np.ndarray | None:
    if tensors.rope_freqs is None:
        return None
    return file.tensor_bytes(tensors.rope_freqs.name).view(np.float32).copy()
