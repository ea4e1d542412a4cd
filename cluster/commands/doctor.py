"""``redshard doctor``: what this machine's GPUs can do, and what is in their way. Starts no Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from redshard.cluster.commands.options import JsonOption
from redshard.loader.units import format_bytes
from redshard.worker.device.choose import GPU_MAKERS, GpuKind
from redshard.worker.device.watchdog import hang_hint
from redshard.worker.diagnosis.known_troubles import Machine, hints
from redshard.worker.diagnosis.trials import Check, Found, GpuDiagnosis, count_gpus, examine_cpu, examine_gpu

_KERNEL = "kernel "


def doctor(as_json: JsonOption = False) -> None:
    """Examine the GPUs of this machine, try what workers will ask of them, and name known troubles."""
    console = Console(stderr=True)
    with console.status("looking for GPUs") as status:
        counts = count_gpus()
        gpus = []
        for kind, count in counts.items():
            for ordinal in range(count.found.get("count", 0)):
                status.update(f"examining {GPU_MAKERS[kind]} GPU {ordinal}")
                gpus.append(examine_gpu(kind, ordinal))
        status.update("measuring the CPU")
        report = _report(counts, gpus, examine_cpu())
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(Console(), report, counts, gpus)
    raise typer.Exit(0 if report["healthy"] else 1)


def _report(counts: dict[GpuKind, Check], gpus: list[GpuDiagnosis], cpu: Found) -> dict[str, Any]:
    """All of it as plain data; "device" is what ``--device auto`` takes."""
    machine = Machine(
        archs=[gpu.arch for gpu in gpus if gpu.kind == "hip" and gpu.arch],
        idle_runtimes=[kind for kind, count in counts.items() if count.found.get("count") == 0],
    )
    return {
        "device": gpus[0].kind if gpus else "cpu",
        "healthy": all(count.answered for count in counts.values()) and not any(gpu.failures for gpu in gpus),
        "runtimes": {kind: count.found or {"unavailable": count.failure} for kind, count in counts.items()},
        "gpus": [asdict(gpu) for gpu in gpus],
        "cpu": cpu,
        "hints": [*_hang_hints(gpus), *hints(machine)],
    }


def _hang_hints(gpus: list[GpuDiagnosis]) -> list[str]:
    """What to do about GPUs that hang or end their process, each hint once."""
    by_hint: dict[str, list[str]] = {}
    for gpu in gpus:
        if not all(check.answered for check in gpu.checks):
            name = f"{GPU_MAKERS[gpu.kind]} GPU {gpu.ordinal}"
            by_hint.setdefault(hang_hint(gpu.kind, gpu.arch), []).append(name)
    return [f"{', '.join(names)} did not answer: {hint}" for hint, names in by_hint.items()]


def _show(
    console: Console, report: dict[str, Any], counts: dict[GpuKind, Check], gpus: list[GpuDiagnosis]
) -> None:
    for gpu in gpus:
        console.print(_gpu_table(gpu))
    console.print(_machine_table(report, counts))
    for hint in report["hints"]:
        console.print(f"[yellow]hint:[/] {escape(hint)}", highlight=False)
    failing = sum(bool(gpu.failures) for gpu in gpus)
    if failing:
        console.print(f"[red]{failing} of {len(gpus)} GPUs failed a check.[/]", highlight=False)


def _gpu_table(gpu: GpuDiagnosis) -> Table:
    table = _two_columns(f"{GPU_MAKERS[gpu.kind]} GPU {gpu.ordinal}")
    kernels = [check for check in gpu.checks if check.name.startswith(_KERNEL) and "seconds" in check.found]
    for check in gpu.checks:
        if check.failure:
            rest = "" if check.answered else "; nothing more was tried"
            table.add_row(check.name, f"[red]failed:[/] {escape(check.failure)}{rest}")
        elif check.name in _TEXTS:
            table.add_row(check.name, escape(_TEXTS[check.name](check.found)))
        elif check is kernels[-1]:
            table.add_row("kernels", _kernels_text(kernels))
    return table


def _machine_table(report: dict[str, Any], counts: dict[GpuKind, Check]) -> Table:
    table = _two_columns("This machine")
    for kind, count in counts.items():
        table.add_row(f"{GPU_MAKERS[kind]} GPUs", _count_text(count))
    cpu = report["cpu"]
    table.add_row(
        "CPU",
        escape(
            f"{cpu['name']}, {cpu['compute_units']} threads, {cpu['arch']} kernels "
            f"(of {', '.join(cpu['features'])}, which work here)\n"
            f"reads {cpu['read_gb_per_s']:.1f} GB/s, {_free(cpu['free_memory'], cpu['total_memory'])}"
        ),
    )
    table.add_row("--device auto", _DEVICES[report["device"]])
    return table


def _count_text(count: Check) -> str:
    if not count.answered:
        return f"[red]failed:[/] counting them: {escape(count.failure)}"
    if count.failure:
        return f"none: {escape(count.failure)}"
    return str(count.found["count"] or "none: the runtime offers no GPU")


def _two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


_DEVICES = {
    "hip": "takes the AMD GPUs",
    "cuda": "takes the NVIDIA GPUs",
    "cpu": "takes the CPU: no GPU can be used",
}


def _device_text(found: Found) -> str:
    matrix = f", matrix unit {', '.join(found['features'])}" if found["features"] else ", no matrix unit"
    return (
        f"{found['name']}, {found['arch']}, {found['compute_units']} compute units, "
        f"waves of {found['wave_size']}{matrix}, {format_bytes(found['lds_bytes'])} local memory"
    )


def _free(free: int, total: int) -> str:
    return f"{format_bytes(free)} of {format_bytes(total)} free"


def _bandwidth_text(found: Found) -> str:
    return (
        f"within the device {found['within_device']:,.1f} GB/s (read and written), from pinned memory "
        f"{found['to_device']:,.1f} GB/s, to it {found['to_host']:,.1f} GB/s"
    )


def _readback_text(found: Found) -> str:
    if found["way"] == "direct":
        return "views can be copied to the host directly"
    return f"views are copied to the host through a buffer of their own: {found['reason']}"


def _peers_text(found: Found) -> str:
    if not found:
        return "no other GPU"
    return ", ".join(f"GPU {other}: {'yes' if can else 'no'}" for other, can in found.items())


def _kernels_text(kernels: list[Check]) -> str:
    compiled, cached = [], []
    for check in kernels:
        source = check.name.removeprefix(_KERNEL)
        if check.found["cached"]:
            cached.append(source)
        else:
            compiled.append(f"{source} {check.found['seconds']:.1f} s")
    parts = {"compiled": compiled, "loaded from the cache": cached}
    return "\n".join(f"{how}: {', '.join(names)}" for how, names in parts.items() if names)


#: What a check found, in words.
_TEXTS: dict[str, Callable[[Found], str]] = {
    "device": _device_text,
    "versions": lambda found: ", ".join(f"{name} {version}" for name, version in found.items()),
    "memory": lambda found: _free(found["free"], found["total"]),
    "readback": _readback_text,
    "bandwidth": _bandwidth_text,
    "kernel result": lambda found: "right",
    "peers": _peers_text,
}
