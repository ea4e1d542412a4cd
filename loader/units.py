"""Sizes the way people write and read them."""

from __future__ import annotations

BYTE_UNITS = {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def format_bytes(nbytes: float) -> str:
    """``1536`` -> ``"1.5 KiB"``, ``3 << 29`` -> ``"1.50 GiB"``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= BYTE_UNITS[unit]:
            return f"{nbytes / BYTE_UNITS[unit]:.{1 if unit in ('MiB', 'KiB') else 2}f} {unit}"
    return f"{nbytes:.0f} B"


def format_count(count: int) -> str:
    """``494032768`` -> ``"494.0 M"``."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)
