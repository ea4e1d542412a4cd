"""Hidden states on their way from one stage to the next.

Through host memory is always possible: an array comes out, and whoever drives the stages sends it on. From
device to device works between two GPU processes on one host: the receiving stage owns an inbox, slots of its
device memory, which the sending stage opens by an interprocess handle. The sender copies its residual stream
into a slot and waits for that copy; only the slot's number travels. Which way a stage sends is decided when
it is connected to the next one.

Sources: HIP runtime API and CUDA Driver API on interprocess communication
(https://rocm.docs.amd.com/projects/HIP, https://docs.nvidia.com/cuda/cuda-driver-api).
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from redshard.worker.device.base import Device, DeviceError, HostBuffer
from redshard.worker.device.gpu import GpuDevice
from redshard.worker.memory.packing import PoolError, align_up
from redshard.worker.memory.pool import GROUP_ALIGNMENT, Buffer, MemoryPool, View
from redshard.worker.model.step_inputs import BatchError

#: Element type of hidden states in host memory. float16 halves the traffic between stages, but overflows on
#: models whose residual stream exceeds 65504. From device to device they are float32, whatever is asked for.
HandoffType = Literal["float32", "float16"]

#: CUDA may cut smaller allocations out of one block, and then shares the whole block.
_SHARED_ALIGNMENT = 2 << 20
_PROBE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class InSlot:
    """Hidden states that lie in a slot of the receiving stage's inbox, float32 (n_tokens, n_embd)."""

    slot: int


#: Hidden states of a step as they travel: an array (n_tokens, n_embd) of the handoff type, or where they are.
Hidden: TypeAlias = "np.ndarray | InSlot"


@dataclass(frozen=True, slots=True)
class InboxOffer:
    """What another process on the same host needs to fill an inbox.

    Attributes:
        handle: opens the inbox's allocation.
        n_slots: slots, one behind the other; slot_bytes: of each.
    """

    handle: bytes
    n_slots: int
    slot_bytes: int


class Inbox:
    """Slots of device memory, in one allocation, that the stage before fills.

    Args:
        pool: of a GPU.
        n_slots: how many.
        slot_bytes: hidden states of the largest step.

    Raises:
        DeviceError: the device shares no memory.
        PoolError: there is no room.
    """

    def __init__(self, pool: MemoryPool, n_slots: int, slot_bytes: int) -> None:
        self._device = _sharing(pool.device)
        self._pool = pool
        self.n_slots, self._slot_bytes = n_slots, align_up(slot_bytes, GROUP_ALIGNMENT)
        self._buffer = pool.allocate("inbox", align_up(n_slots * self._slot_bytes, _SHARED_ALIGNMENT))

    def offer(self) -> InboxOffer:
        """For the process that sends."""
        return InboxOffer(self._device.share(self._buffer.address), self.n_slots, self._slot_bytes)

    def take(self, hidden: InSlot, destination: int, nbytes: int) -> None:
        """Copy a slot to an address of this device, asynchronously."""
        if not 0 <= hidden.slot < self.n_slots or nbytes > self._slot_bytes:
            raise BatchError(
                f"hidden states of {nbytes} bytes in slot {hidden.slot}: "
                f"the inbox has {self.n_slots} slots of {self._slot_bytes} bytes"
            )
        self._device.copy(destination, self._buffer.address + hidden.slot * self._slot_bytes, nbytes)

    def finds(self, probe: bytes) -> bool:
        """Whether the first slot begins with these bytes."""
        return self._pool.read(self._buffer.view(0, len(probe))).tobytes() == probe


class Outbox:
    """The inbox of the next stage, seen from the process that fills it.

    Slots are filled in turn, and there are as many as there may be steps submitted and not yet collected, say
    n. The step that fills a slot again is the n-th after the one that filled it before, so it was submitted
    when that one had been collected, which is after every stage had waited for it: nobody reads the slot now.

    Args:
        pool: of the GPU that sends.
        offer: of the stage that receives.

    Raises:
        DeviceError: the device cannot open it.
    """

    def __init__(self, pool: MemoryPool, offer: InboxOffer) -> None:
        self._device, self._pool, self._offer = _sharing(pool.device), pool, offer
        self._next = 0
        with pool.watchdog.guard("opening the next stage's inbox", pool.deadlines.copy_s):
            self._address = self._device.open_shared(offer.handle)

    def send(self, source: View) -> InSlot:
        """Copy to the next slot and wait, so that the receiver finds the bytes when it hears of the slot."""
        slot, self._next = self._next, (self._next + 1) % self._offer.n_slots
        self._device.copy(self._address + slot * self._offer.slot_bytes, source.address, source.nbytes)
        self._device.synchronize(self._pool.deadlines.step_s)
        return InSlot(slot)

    def close(self) -> None:
        """Let go of the inbox, which may be that of a dead process."""
        self._device.close_shared(self._address)


class Handoff:
    """How hidden states come into a stage and leave it.

    Args:
        pool: of the device.
        hidden: begins with the residual stream, float32 (max_tokens, n_embd).
        staging: room for as much in host memory.
        max_tokens: rows of the largest step; n_embd: elements of a row.
        dtype: element type of hidden states in host memory.
    """

    def __init__(
        self,
        pool: MemoryPool,
        hidden: Buffer,
        staging: HostBuffer,
        max_tokens: int,
        n_embd: int,
        dtype: HandoffType,
    ) -> None:
        self._pool, self._device = pool, pool.device
        self._hidden, self._staging = hidden, staging
        self._max_tokens, self._n_embd, self._dtype = max_tokens, n_embd, np.dtype(dtype)
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None

    @property
    def sends_by(self) -> Literal["device memory", "host memory"]:
        """The way hidden states leave."""
        return "host memory" if self._outbox is None else "device memory"

    def take(self, hidden: Hidden, n_tokens: int) -> None:
        """Bring what the stage before gave onto the device, asynchronously.

        Raises:
            BatchError: it is not of the right shape or type, or in no slot of this stage.
        """
        expected = (n_tokens, self._n_embd)
        nbytes = 4 * math.prod(expected)
        if isinstance(hidden, InSlot):
            if self._inbox is None:
                raise BatchError(f"hidden states are in slot {hidden.slot}, but this stage has no inbox")
            self._inbox.take(hidden, self._hidden.address, nbytes)
            return
        if hidden.shape != expected or hidden.dtype != self._dtype:
            raise BatchError(
                f"hidden states are {hidden.dtype} {hidden.shape}, but must be {self._dtype} {expected}"
            )
        self._staged(n_tokens)[:] = hidden
        self._device.copy_in(self._hidden.address, self._staging, nbytes)

    def send(self, n_tokens: int) -> Hidden:
        """Wait for the device and give the residual stream for the next stage."""
        view = self._hidden.view(0, 4 * n_tokens * self._n_embd)
        if self._outbox is not None:
            return self._outbox.send(view)
        self._pool.copy_out(self._staging, view)
        self._device.synchronize(self._pool.deadlines.step_s)
        return self._staged(n_tokens).astype(self._dtype)

    def open_inbox(self, n_slots: int) -> InboxOffer:
        """Offer this stage's inbox to the stage before.

        Args:
            n_slots: steps that may be submitted and not yet collected. The inbox is made at the first call
                and kept, so later calls cannot ask for more.

        Raises:
            DeviceError: the device shares no memory.
            PoolError: there is no room.
        """
        if self._inbox is None:
            self._inbox = Inbox(self._pool, n_slots, 4 * self._max_tokens * self._n_embd)
        if n_slots > self._inbox.n_slots:
            raise PoolError(f"the inbox has {self._inbox.n_slots} slots, but {n_slots} are wanted")
        return self._inbox.offer()

    def connect(self, offer: InboxOffer) -> bytes:
        """Send into the next stage's inbox from now on, and no longer into any other.

        Returns:
            What lies in the inbox now, for the other stage's `finds`: some machines open a handle and then
            lose what is written through it.

        Raises:
            DeviceError: the inbox cannot be opened or written; hidden states leave through host memory.
        """
        self.disconnect()
        outbox = Outbox(self._pool, offer)
        probe = np.random.default_rng().bytes(min(_PROBE_BYTES, offer.slot_bytes, self._hidden.nbytes))
        view = self._hidden.view(0, len(probe))
        try:
            self._pool.write(view, np.frombuffer(probe, np.uint8))
            outbox.send(view)
        except DeviceError:
            with suppress(DeviceError):  # the first error says more
                outbox.close()
            raise
        self._outbox = outbox
        return probe

    def finds(self, probe: bytes) -> bool:
        """Whether the probe that `connect` gave has arrived."""
        return self._inbox is not None and self._inbox.finds(probe)

    def disconnect(self) -> None:
        """Send through host memory from now on. Idempotent."""
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.close()

    def _staged(self, n_tokens: int) -> np.ndarray:
        """The start of the staging buffer as hidden states."""
        count = n_tokens * self._n_embd
        return self._staging.array[: 4 * count].view(np.float32).reshape(n_tokens, self._n_embd)


def _sharing(device: Device) -> GpuDevice:
    """The device, if it can share memory with other processes."""
    if not isinstance(device, GpuDevice):
        raise DeviceError(f"{device.properties.name} shares no memory with other processes: it is no GPU")
    return device
