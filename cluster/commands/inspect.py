"""``redshard inspect``: what a GGUF file holds, without Ray or a device."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from redshard.cluster.commands.options import JsonOption, ModelArgument
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.loader.model.configuration import UnsupportedModelError
from redshard.loader.model_path import find_model
from redshard.loader.units import format_bytes, format_count


def inspect(
    model: ModelArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's architecture, hyperparameters, tokenizer and tensors."""
    with GGUFFile.open(find_model(model)) as file:
        summary = summarize(file)
        if tensors:
            summary["tensors"] = [
                {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes}
                for t in file.tensors.values()
            ]
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    for table in _tables(summary):
        Console().print(table)


def summarize(file: GGUFFile) -> dict[str, Any]:
    """What `file` holds, as plain data: file, hyperparameters, tokenizer and totals by tensor type.

    Where the architecture is not supported, the reason stands in place of the hyperparameters.
    """
    return {
        "file": {
            "paths": [str(path) for path in file.paths],
            "bytes": sum(path.stat().st_size for path in file.paths),
            "version": file.version,
            "name": file.metadata.get("general.name"),
            "architecture": file.metadata.get("general.architecture"),
        },
        "hyperparameters": _hyperparameters(file),
        "tokenizer": _tokenizer(file),
        "types": _types(file),
    }


def _hyperparameters(file: GGUFFile) -> dict[str, Any]:
    if not file.tensors:
        return {"unavailable": "the file holds no tensors"}
    try:
        config = read_config(file)
    except UnsupportedModelError as error:
        return {"unavailable": str(error)}
    values = {"n_layers": config.n_layers} | config.model_dump(exclude={"name", "architecture", "layers"})
    bodies = [_flat(branch.body.model_dump()) for layer in config.layers for branch in layer.branches]
    for key in dict.fromkeys(key for body in bodies for key in body):
        by_layer = [body[key] for body in bodies if key in body]
        values[key] = by_layer[0] if len(set(by_layer)) == 1 else by_layer
    return values


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values, those within another under both names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            {f"{key}_{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def _tokenizer(file: GGUFFile) -> dict[str, Any]:
    metadata = file.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    special = {
        key.removeprefix("tokenizer.ggml."): metadata[key]
        for key in metadata
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
    }
    return {
        "model": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "tokens": len(tokens) if isinstance(tokens, list) else 0,
        "chat_template": "tokenizer.chat_template" in metadata,
        **special,
    }


def _types(file: GGUFFile) -> list[dict[str, Any]]:
    count: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for tensor in file.tensors.values():
        count[tensor.type.name] += 1
        nbytes[tensor.type.name] += tensor.nbytes
        elements[tensor.type.name] += math.prod(tensor.shape)
    return [
        {"type": name, "tensors": count[name], "elements": elements[name], "bytes": size}
        for name, size in nbytes.most_common()
    ]


def _tables(summary: dict[str, Any]) -> list[Table]:
    tables = [
        _pairs("File", summary["file"] | {"bytes": format_bytes(summary["file"]["bytes"])}),
        _pairs("Hyperparameters", summary["hyperparameters"]),
        _pairs("Tokenizer", summary["tokenizer"]),
        _types_table(summary["types"]),
    ]
    if "tensors" in summary:
        tables.append(_tensors_table(summary["tensors"]))
    return tables


def _pairs(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key.replace("_", " "), _readable(value))
    return table


def _readable(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"  # the file stores float32
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return str(value)


def _types_table(types: list[dict[str, Any]]) -> Table:
    table = Table(title="Tensors by type", title_justify="left", show_footer=True)
    table.add_column("type", footer="all")
    table.add_column("tensors", justify="right", footer=str(sum(row["tensors"] for row in types)))
    table.add_column("elements", justify="right", footer=format_count(sum(row["elements"] for row in types)))
    table.add_column("size", justify="right", footer=format_bytes(sum(row["bytes"] for row in types)))
    for row in types:
        table.add_row(
            row["type"], str(row["tensors"]), format_count(row["elements"]), format_bytes(row["bytes"])
        )
    return table


def _tensors_table(tensors: list[dict[str, Any]]) -> Table:
    table = Table(title="Tensors", title_justify="left")
    table.add_column("name")
    table.add_column("type")
    table.add_column("shape", justify="right")
    table.add_column("size", justify="right")
    for row in tensors:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], row["type"], shape, format_bytes(row["bytes"]))
    return table
