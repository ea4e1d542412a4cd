"""Some layers of a model on one device: recorded once, replayed for every step.

The first stage embeds tokens, the last one samples or gives logits; in between, the residual stream is handed
over (`redshard.worker.model.handoff`). A step is one copy of its inputs, a few graph replays, one copy out
and one wait: no device allocation, and no Python for each operation. On a device that queues work the next
step may be launched before the last one has been waited for.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from redshard.loader.model.cache_groups import cache_groups
from redshard.loader.model.configuration import AttentionConfig, RopeConfig
from redshard.loader.model.rotary import rotary_table
from redshard.worker.device.arguments import MAX_TOP_LOGPROBS
from redshard.worker.device.base import Device, Event, Graph, HostBuffer
from redshard.worker.device.watchdog import Guard
from redshard.worker.memory.kv_cache import KVCache
from redshard.worker.memory.pool import MemoryPool
from redshard.worker.model.arena import Arena
from redshard.worker.model.blocks.block import LayerCache, Site
from redshard.worker.model.forward import ForwardPass
from redshard.worker.model.handoff import Handoff, HandoffType, Hidden
from redshard.worker.model.sampler import SampleOutputs, logits_result
from redshard.worker.model.step_batch import StepBatch, StepResult
from redshard.worker.model.step_deadline import StepDeadline
from redshard.worker.model.step_inputs import (
    BatchError,
    InputLayout,
    InputStaging,
    StepInputs,
    StepLimits,
)
from redshard.worker.model.weights import StageWeights

#: A graph for each bucket of rows, ascending.
Graphs = dict[int, Graph]
#: Puts operations for so many rows in order on a device.
Launch = Callable[[Device, int], None]

#: Steps that may be launched and not yet waited for.
STEPS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device is running.

    Attributes:
        batch: the step.
        began: when it was launched, in seconds of the monotonic clock.
        results: host memory that its sampled tokens are on the way to; None where it gives hidden states.
        arrived: when they are there.
        result: of a step that was waited for at once.
    """

    batch: StepBatch
    began: float
    results: HostBuffer | None = None
    arrived: Event | None = None
    result: StepResult | None = None


class Stage:
    """A part of a model with the key/value cache of its layers.

    Args:
        pool: of the device with the weights; inputs, activations, rotary table and cache come from it.
        weights: the stage's tensors on the device.
        limits: the largest step.
        freq_factors: float32 (n_rot / 2,), the model's divisors of the rotary frequencies, if it has any.
        handoff: element type of hidden states between stages.
        check_finite: look at the hidden states after every layer, and refuse the step that has others than
            finite ones; slow, for finding out where they come from.

    Attributes:
        part: what it has of the model.
        handoff: how hidden states come in and leave; through host memory, unless connected otherwise.
        steps, tokens: run so far; busy_s: seconds that a step was under way.

    Raises:
        PoolError: the device has no room.
        DeviceError: the device has no kernel for one of the weights' types, or failed.
    """

    def __init__(
        self,
        pool: MemoryPool,
        weights: StageWeights,
        limits: StepLimits,
        freq_factors: np.ndarray | None = None,
        handoff: HandoffType = "float32",
        check_finite: bool = False,
    ) -> None:
        self._check_finite = check_finite
        self.limits = limits
        self.part = weights.part
        self._pool, self._device, self._config = pool, pool.device, weights.config
        config = weights.config
        self.steps = self.tokens = 0
        self.busy_s = 0.0
        self._deadline = StepDeadline(pool.deadlines.step_s)
        self._idle_since = 0.0
        self._outputs = SampleOutputs(limits.max_outputs)
        self._host_buffers: list[HostBuffer] = []
        self._turn = 0
        self._tables_graphs: Graphs = {}
        self._layer_graphs: dict[str, Graphs] = {}  # by what they compute; one for all layers, as a rule
        self._logits_graphs: Graphs = {}
        self._sample_graphs: dict[int, Graphs] = {}

        self._caches = [
            KVCache(pool, group, limits.n_kv_blocks, limits.block_size)
            for group in cache_groups(config, weights.part.layers)
        ]
        layout = InputLayout(limits)
        self._input_buffer = pool.allocate("inputs", layout.nbytes)
        self._input_stagings = [
            InputStaging(layout, self._allocate_host(layout.nbytes)) for _ in range(STEPS_AT_ONCE)
        ]
        part = weights.part
        self._inputs = StepInputs(limits, config.n_vocab, looks_up=part.is_first and part.is_last)
        self._slots = self._allocate_slots()
        on_site = partial(
            Site,
            weights=weights,
            limits=limits,
            inputs=layout.addresses(self._input_buffer.address),
            caches=self._layer_caches(),
            rotary={rope: self._upload_rotary(rope, freq_factors) for rope in config.ropes},
            newest=self._slots.get("newest tokens"),
            scratch_bytes=self._scratch_bytes,
        )
        measured = Arena()
        ForwardPass(on_site(arena=measured))
        self._arena = pool.allocate("activations", measured.nbytes)
        self._forward = ForwardPass(on_site(arena=Arena(self._arena.address)))
        row_nbytes = 4 * config.n_vocab if part.is_last else 0
        self._staging = self._allocate_host(max(4 * limits.max_tokens * config.n_embd, row_nbytes))
        self._result_stagings = [
            self._allocate_host(self._outputs.nbytes(n_top=1))
            for _ in range(STEPS_AT_ONCE if part.is_last else 0)
        ]
        # The residual stream is the first in the arena.
        self.handoff = Handoff(pool, self._arena, self._staging, limits.max_tokens, config.n_embd, handoff)
        self._record()

    def run(self, batch: StepBatch, hidden: Hidden | None = None) -> Hidden | StepResult:
        """Run one step and wait for it; as `launch` and `finish`."""
        return self.finish(self.launch(batch, hidden))

    def launch(self, batch: StepBatch, hidden: Hidden | None = None) -> Launched:
        """Put one step on its way. Of the steps before, all but `STEPS_AT_ONCE` - 1 must be finished.

        Only the last stage can have several steps under way; others hand over what the next would overwrite.

        Args:
            batch: the step.
            hidden: what the stage before gave; None on the first stage.

        Raises:
            BatchError: the batch contradicts itself or exceeds the limits; nothing was run. Or its hidden
                states are not finite, where that is checked.
            DeviceError: the device failed.
        """
        began = time.monotonic()
        with self._guard(len(batch.token_ids)):
            if self.part.is_first != (hidden is None):
                raise BatchError("hidden states go into every stage but the first")
            turn = self._turn
            staging = self._input_stagings[turn]
            nbytes = self._inputs.pack(batch, staging, self.part.is_last and not batch.return_logits)
            n_tokens = len(batch.token_ids)
            if hidden is not None:
                self.handoff.take(hidden, n_tokens)
            self._turn = (turn + 1) % STEPS_AT_ONCE
            self._device.copy_in(self._input_buffer.address, staging.buffer, nbytes)
            if staging.step[3] and self._tables_graphs:
                _replay(self._tables_graphs, 1)
            for what, graphs in self._layer_graphs.items():
                _replay(graphs, n_tokens)
                if self._check_finite:
                    self._refuse_others_than_finite(what, n_tokens)
            if not self.part.is_last:
                return Launched(batch, began)
            return self._launch_output(batch, turn, began)

    def finish(self, launched: Launched) -> Hidden | StepResult:
        """Wait for the oldest step that was launched.

        Returns:
            Hidden states for the next stage, or the result.

        Raises:
            DeviceError: the device failed.
        """
        if launched.result is not None:
            self._count(launched)
            return launched.result
        batch = launched.batch
        with self._guard(len(batch.token_ids)):
            if launched.results is None or launched.arrived is None:
                out: Hidden | StepResult = self.handoff.send(len(batch.token_ids))
            else:
                launched.arrived.synchronize()
                out = self._outputs.read(
                    launched.results.array, batch.step_id, len(batch.output_rows), batch.n_top
                )
        self._count(launched)
        return out

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(cache.nbytes for cache in self._caches)

    def close(self) -> None:
        """Release graphs, staging memory and the next stage's inbox. Idempotent; the pool frees the rest."""
        self.handoff.disconnect()
        recorded = (
            self._tables_graphs,
            *self._layer_graphs.values(),
            self._logits_graphs,
            *self._sample_graphs.values(),
        )
        for graphs in recorded:
            for graph in graphs.values():
                graph.release()
            graphs.clear()
        for buffer in self._host_buffers:
            self._device.free_host(buffer)
        self._host_buffers.clear()

    def _allocate_host(self, nbytes: int) -> HostBuffer:
        buffer = self._device.allocate_host(nbytes)
        self._host_buffers.append(buffer)
        return buffer

    def _allocate_slots(self) -> dict[str, int]:
        """Addresses of what stays on the device by slot: block tables, and the token sampled last."""
        limits = self.limits
        sizes = {}
        if self._caches:
            sizes["block tables"] = 4 * limits.table_entries
        if self.part.is_last:
            sizes["newest tokens"] = 4 * limits.max_sequences
        if not sizes:
            return {}
        views = self._pool.allocate_group("slots", sizes)
        for view in views.values():
            self._device.fill(view.address, 0, view.nbytes)
        return {name: view.address for name, view in views.items()}

    def _upload_rotary(self, rope: RopeConfig, freq_factors: np.ndarray | None) -> int:
        table = rotary_table(rope, self.limits.max_context, freq_factors)
        buffer = self._pool.allocate("rotary table", table.nbytes)
        self._pool.write(buffer.view(0, table.nbytes), table)
        return buffer.address

    def _layer_caches(self) -> dict[int, LayerCache]:
        """Where the layers' keys and values are, by the layers' numbers in the model."""
        return {
            layer: LayerCache(keys.address, cache.values[layer].address, self._slots["block tables"])
            for cache in self._caches
            for layer, keys in cache.keys.items()
        }

    def _scratch_bytes(self, attention: AttentionConfig) -> int:
        """What the device's attention wants besides its inputs and outputs."""
        limits = self.limits
        return self._device.scratch_bytes(
            limits.max_tokens,
            limits.max_sequences,
            attention.n_heads,
            attention.value_dim,
            limits.table_width * limits.block_size,
            limits.total_context,
        )

    def _record(self) -> None:
        """Record the layers once for every bucket of rows, and on the last stage what follows them."""
        forward, limits = self._forward, self.limits
        if self._caches:
            self._tables_graphs = self._recorded(1, forward.set_tables)
        parts: dict[str, Launch] = {}
        if self._check_finite:
            parts |= {"the embedding": forward.embed} if self.part.is_first else {}
            parts |= {f"layer {layer}": partial(forward.layer, layer=layer) for layer in self.part.layers}
        elif self.part.layers or self.part.is_first:
            parts["all layers"] = forward.layers
        self._layer_graphs = {
            what: self._recorded(limits.max_tokens, launch) for what, launch in parts.items()
        }
        if forward.output is not None:
            self._logits_graphs = self._recorded(limits.max_outputs, forward.output.launch)
            # Ranking a vocabulary takes time: steps that want no most probable tokens have their own graphs.
            self._sample_graphs = {
                n_top: self._recorded(
                    limits.max_outputs, partial(forward.output.launch_sampling, n_top=n_top)
                )
                for n_top in (0, MAX_TOP_LOGPROBS)
            }

    def _recorded(self, max_rows: int, launch: Launch) -> Graphs:
        """One graph for every row count that the device wants a graph of its own for."""
        graphs: list[Graph] = []
        buckets = self._device.row_buckets(max_rows)
        for rows in buckets:
            with self._device.recording(graphs):
                launch(self._device, rows)
        return dict(zip(buckets, graphs, strict=True))

    def _guard(self, rows: int) -> Guard:
        """Ends the process if the block takes longer than a step of so many rows may."""
        return self._pool.watchdog.guard(f"a step of {rows} tokens", self._deadline.of(rows))

    def _count(self, launched: Launched) -> None:
        """Note a step that is done."""
        now, n_tokens = time.monotonic(), len(launched.batch.token_ids)
        seconds = now - max(launched.began, self._idle_since)
        self._deadline.note(n_tokens, seconds)
        self._idle_since = now
        self.steps += 1
        self.tokens += n_tokens
        self.busy_s += seconds

    def _refuse_others_than_finite(self, what: str, n_tokens: int) -> None:
        """Raise BatchError if the residual stream is not finite."""
        hidden = self._pool.read(self._arena.view(0, 4 * n_tokens * self._config.n_embd))
        rows = np.flatnonzero(~np.isfinite(hidden.view(np.float32).reshape(n_tokens, -1)).all(axis=1))
        if len(rows):
            raise BatchError(
                f"the hidden states are not finite after {what}, in {len(rows)} of {n_tokens} rows"
            )

    def _launch_output(self, batch: StepBatch, turn: int, began: float) -> Launched:
        """Sample the output rows, or read their logits."""
        n_outputs, output = len(batch.output_rows), self._forward.output
        assert output is not None
        if n_outputs:
            _replay(self._logits_graphs, n_outputs)
        if batch.return_logits:
            result = logits_result(batch.step_id, self._read_logits(n_outputs, output.logits))
            return Launched(batch, began, result=result)
        if n_outputs:
            _replay(self._sample_graphs[MAX_TOP_LOGPROBS if batch.n_top else 0], n_outputs)
        results = self._result_stagings[turn]
        view = self._arena.view(output.sampled - self._arena.address, self._outputs.nbytes(batch.n_top))
        self._pool.copy_out(results, view)
        return Launched(batch, began, results, self._device.record_event())

    def _read_logits(self, n_outputs: int, address: int) -> np.ndarray:
        n_vocab = self._config.n_vocab
        logits = np.empty((n_outputs, n_vocab), np.float32)
        at_once = self._staging.array.nbytes // (4 * n_vocab)
        for start in range(0, n_outputs, at_once):
            piece = logits[start : start + at_once]
            self._copy_out(address + 4 * n_vocab * start, piece.nbytes)
            piece[:] = self._staged(piece.shape)
        return logits

    def _copy_out(self, address: int, nbytes: int) -> None:
        """Bring a range of the arena into the staging buffer and wait for it, and so for the whole step."""
        view = self._arena.view(address - self._arena.address, nbytes, alignment=4)
        self._pool.copy_out(self._staging, view)
        self._device.synchronize(self._pool.deadlines.step_s)

    def _staged(self, shape: tuple[int, ...]) -> np.ndarray:
        """The start of the staging buffer as float32 of this shape."""
        return self._staging.array[: 4 * math.prod(shape)].view(np.float32).reshape(shape)


def _replay(graphs: Graphs, rows: int) -> None:
    """Replay the graph of the smallest bucket that holds `rows`."""
    buckets = list(graphs)
    graphs[buckets[bisect_left(buckets, rows)]].replay()
