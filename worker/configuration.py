"""What a person may configure about a worker; checked when it is read, so nothing later meets a bad value."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

ReadbackPolicy = Literal["probe", "direct", "bounce"]


class _Settings(BaseModel):
    """Immutable; unknown names are refused. Sizes are bytes, as numbers or as text such as ``"512MiB"``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PoolSettings(_Settings):
    """How device memory is allocated.

    Attributes:
        segment_bytes: size of the allocations that weights are packed into.
        alignment: of every tensor in a segment; a power of two.
        readback: how bytes of a view come back to the host. ``direct`` copies from the view; ``bounce``
            copies within the device to an allocation of its own first; ``probe`` tries the first and falls
            back on the second.
    """

    segment_bytes: ByteSize = Field(default=ByteSize(GIB), ge=64 * KIB)
    alignment: ByteSize = Field(default=ByteSize(4 * KIB), ge=256, le=2 * MIB)
    readback: ReadbackPolicy = "probe"

    @field_validator("alignment")
    @classmethod
    def _power_of_two(cls, value: ByteSize) -> ByteSize:
        if value & (value - 1):
            raise ValueError(f"alignment is {int(value)} bytes, but must be a power of two")
        return value


class UploadSettings(_Settings):
    """How weights travel from a file to the device.

    Attributes:
        staging_buffers: pinned host buffers used in turn: one is read into while the others are copied from.
        staging_bytes: size of each.
        sync_bytes: the host waits for the device each time this many bytes are under way.
    """

    staging_buffers: int = Field(default=2, ge=2, le=64)
    staging_bytes: ByteSize = Field(default=ByteSize(16 * MIB), ge=4 * KIB, le=GIB)
    sync_bytes: ByteSize = Field(default=ByteSize(256 * MIB), ge=4 * KIB)


class Deadlines(_Settings):
    """Seconds that one call may take before the worker counts as hung and ends, or is ended.

    Attributes:
        allocate_s: one allocation.
        copy_s: the copies between two gates of an upload, or one readback.
        step_s: one step of a stage.
        start_s: the start of the worker's process, with opening its device.
        load_idle_s: loading without a byte uploaded; kernels are compiled in that time.
    """

    allocate_s: float = Field(default=60.0, gt=0)
    copy_s: float = Field(default=120.0, gt=0)
    step_s: float = Field(default=300.0, gt=0)
    start_s: float = Field(default=120.0, gt=0)
    load_idle_s: float = Field(default=900.0, gt=0)


class WorkerConfiguration(_Settings):
    """Everything configurable about one worker.

    Attributes:
        check_finite: look for the layer after which hidden states are not finite; slow.
    """

    pool: PoolSettings = PoolSettings()
    upload: UploadSettings = UploadSettings()
    deadlines: Deadlines = Deadlines()
    check_finite: bool = False
