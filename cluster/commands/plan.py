"""``redshard plan``: which layers would go to which GPU, without Ray or a device."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from redshard.cluster.commands.options import ContextOption, JsonOption, ModelArgument, SequencesOption
from redshard.cluster.errors import ParameterError
from redshard.cluster.pipeline.plan import PipelineSettings, default_step_tokens, overhead_bytes
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.loader.model.configuration import ModelConfig
from redshard.loader.model.tensors import ModelTensors
from redshard.loader.model_path import find_model
from redshard.loader.shard_plan import ModelSize, ShardPlan, parse_gpus, plan_shards
from redshard.worker.configuration import WorkerConfiguration


def plan(
    model: ModelArgument,
    gpus: Annotated[
        str, typer.Option(help="GPUs and their memory, such as 4x16GiB,1x8GiB.", show_default=False)
    ],
    context: ContextOption = None,
    sequences: SequencesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Show which layers, bytes and cached tokens would go to which GPU, and what would not fit."""
    devices = parse_gpus(gpus)
    with GGUFFile.open(find_model(model)) as file:
        config = read_config(file)
        size = ModelSize.of(config, ModelTensors(config, file))
    context = context or config.default_context
    if context > config.context_length:
        raise ParameterError(
            f"--context {context} exceeds the {config.context_length} tokens {config.name} was made for"
        )
    asked = context * sequences
    settings = PipelineSettings(
        path=model,
        n_stages=len(devices),
        kind="auto",
        max_context=context,
        max_sequences=sequences,
        max_step_tokens=default_step_tokens(len(devices), sequences),
        cache_tokens=asked,
        handoff="float32",
        worker=WorkerConfiguration(),
    )
    shards = plan_shards(size, devices, asked, overhead_bytes(config, settings, asked))
    if as_json:
        tokens = {"context": context, "sequences": sequences, "kv_tokens_asked": asked}
        print(json.dumps(tokens | {"kv_tokens": shards.kv_tokens} | asdict(shards), indent=2))
        return
    _show(shards, config, context, sequences)


def _show(shards: ShardPlan, config: ModelConfig, context: int, sequences: int) -> None:
    table = Table(
        title=f"{config.name}: {config.n_layers} layers, {sequences} x {context:,} tokens of context",
        title_justify="left",
    )
    for column in shards.COLUMNS:
        table.add_column(column, justify="right")
    for row in shards.as_rows():
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(
        f"The cache of every GPU holds up to {shards.kv_tokens:,} tokens: "
        f"{shards.kv_tokens // context:,} sequences of {context:,}."
    )
