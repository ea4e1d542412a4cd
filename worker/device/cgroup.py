"""What the control groups of this process let it use: containers get less than the machine has.

Source: the Linux kernel's documentation, admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes this process may still use under the strictest limit above it; None without a limit.

    Page cache that can be dropped counts as available.
    """
    rooms = []
    for group in _groups("memory", root, membership):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            rooms.append(max(0, limit - used + _inactive_file(group)))
    return min(rooms, default=None)


def memory_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes this process may use in all; None without a limit."""
    limits = [
        _number(group / "memory.max", group / "memory.limit_in_bytes")
        for group in _groups("memory", root, membership)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def cpu_limit(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> float | None:
    """CPUs' worth of time this process may use; None without a limit."""
    limits = []
    for group in _groups("cpu", root, membership):
        quota, period = _cpu_quota(group)
        if quota is not None and period:
            limits.append(quota / period)
    return min(limits, default=None)


def _groups(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Folders of the control groups that hold this process, of either version."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root
        elif controller in controllers.split(","):
            mount = root / controller
        else:
            continue
        # Within a container the path may be the host's; the mount's own root is then the container's group.
        group = Path(path.lstrip("/"))
        for ancestor in (group, *group.parents):
            if (mount / ancestor).is_dir():
                yield mount / ancestor


def _number(*files: Path) -> int | None:
    """The first readable file's integer; None for what stands for no limit, and for no file."""
    for file in files:
        try:
            value = int(file.read_text())
        except (OSError, ValueError):
            continue
        return value if 0 <= value < 1 << 60 else None
    return None


def _inactive_file(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = {name: int(count) for name, count in (line.split() for line in lines)}
    return counts.get("total_inactive_file", counts.get("inactive_file", 0))


def _cpu_quota(group: Path) -> tuple[int | None, int | None]:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return (None, None) if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        return _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
