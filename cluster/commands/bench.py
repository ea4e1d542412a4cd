"""``redshard bench``: how fast a model loads, reads prompts and generates, beside the machine's limit."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from redshard.cluster.commands.loading import Loaded, loaded_model
from redshard.cluster.commands.options import (
    DeviceName,
    DeviceOption,
    JsonOption,
    ModelArgument,
    SequencesOption,
    StagesOption,
)
from redshard.cluster.completion import Usage
from redshard.cluster.engine.sampling_params import SamplingParams
from redshard.cluster.errors import ParameterError
from redshard.loader.gguf.gguf_file import GGUFFile
from redshard.loader.model.architectures import read_config
from redshard.loader.model_path import find_model
from redshard.loader.units import format_bytes
from redshard.worker.device.bandwidth import host_read_bandwidth
from redshard.worker.device.cpu import usable_cpus

if TYPE_CHECKING:
    from redshard.cluster.client.llm import LLM


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens a second.

    Attributes:
        prompt: reading one prompt.
        decode: generating one sequence, after its first token.
        batch: generating several sequences together, after their first tokens.
    """

    prompt: float
    decode: float
    batch: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `redshard bench` finds out.

    Attributes:
        load_s: seconds from the command to a model ready to generate.
        throughput: medians over the rounds.
        bytes_per_token: weights a decode step reads.
        bandwidth: bytes a second this machine's memory can be read; None where the model runs on GPUs.
        overheads_us: microseconds of a decode step by what they were spent on.
        worker_bytes: what each worker holds on its device.
    """

    load_s: float
    throughput: Throughput
    bytes_per_token: int
    bandwidth: float | None
    overheads_us: dict[str, float]
    worker_bytes: list[int]

    @property
    def bandwidth_share(self) -> float | None:
        """How much of the bandwidth decoding uses by its weights alone."""
        if self.bandwidth is None:
            return None
        return self.throughput.decode * self.bytes_per_token / self.bandwidth


def bench(
    model: ModelArgument,
    stages: StagesOption = 1,
    device: DeviceOption = DeviceName.AUTO,
    prompt: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of the prompt; 512 or what the model takes unless given.", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each sequence.")] = 64,
    sequences: SequencesOption = 16,
    rounds: Annotated[
        int, typer.Option(min=1, max=1000, help="How often to measure; medians are shown.")
    ] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure loading, prompts, decoding and batches on random tokens."""
    longest = _longest_prompt(model)
    if prompt is None:
        prompt = min(512, longest)
    for option, length in (("--prompt", prompt), ("--tokens", tokens)):
        if length > longest:
            raise ParameterError(f"{option} is {length}; the context of {model} has room for {longest}")
    context = max(prompt, tokens) + 1
    options = {"stages": stages, "device": device.value, "max_context": context, "max_sequences": sequences}
    with loaded_model(model, **options) as loaded:
        report = measure(loaded, prompt, tokens, sequences, rounds)
    if as_json:
        print(json.dumps(asdict(report) | {"bandwidth_share": report.bandwidth_share}, indent=2))
    else:
        _show(report, prompt, tokens, sequences)


def _longest_prompt(model: str) -> int:
    """Tokens that fit into the model's context beside one token more."""
    with GGUFFile.open(find_model(model)) as file:
        return read_config(file).context_length - 1


def measure(loaded: Loaded, n_prompt: int, n_tokens: int, n_sequences: int, rounds: int) -> Report:
    """Run every measurement `rounds` times, in turn, after one round that does not count."""
    llm = loaded.llm
    rng = np.random.default_rng(0)
    measure_once(llm, rng, n_prompt, n_tokens, n_sequences)
    results = [measure_once(llm, rng, n_prompt, n_tokens, n_sequences) for _ in range(rounds)]
    overheads = _overheads(llm, lambda: _decode_rate(llm, rng, 1, n_tokens))
    workers = llm.stats()["workers"]
    on_cpu = all(worker["kind"] == "cpu" for worker in workers)
    return Report(
        load_s=loaded.load_s,
        throughput=Throughput(
            *(
                statistics.median(getattr(result, name) for result in results)
                for name in ("prompt", "decode", "batch")
            )
        ),
        bytes_per_token=sum(worker["weight_bytes_per_token"] for worker in workers),
        bandwidth=host_read_bandwidth(usable_cpus()) if on_cpu else None,
        overheads_us=overheads,
        worker_bytes=loaded.worker_bytes(),
    )


def measure_once(
    llm: LLM, rng: np.random.Generator, n_prompt: int, n_tokens: int, n_sequences: int
) -> Throughput:
    """One prompt, one sequence and one batch, one after the other."""
    return Throughput(
        prompt=_prompt_rate(llm, rng, n_prompt),
        decode=_decode_rate(llm, rng, 1, n_tokens),
        batch=_decode_rate(llm, rng, n_sequences, n_tokens),
    )


def _generate(llm: LLM, rng: np.random.Generator, n_prompts: int, length: int, n_tokens: int) -> list[Usage]:
    prompts = rng.integers(0, llm.config.n_vocab, (n_prompts, length)).tolist()
    params = SamplingParams(max_tokens=n_tokens, temperature=0, ignore_eos=True)
    return [completion.usage for completion in llm.generate(prompts, params)]


def _prompt_rate(llm: LLM, rng: np.random.Generator, length: int) -> float:
    (usage,) = _generate(llm, rng, 1, length, 1)
    return length / usage.first_token_s


def _decode_rate(llm: LLM, rng: np.random.Generator, n_sequences: int, n_tokens: int) -> float:
    """From the moment all sequences have their first token to the end of the last one."""
    usages = _generate(llm, rng, n_sequences, 1, n_tokens)
    seconds = max(usage.total_s for usage in usages) - max(usage.first_token_s for usage in usages)
    return sum(usage.completion_tokens - 1 for usage in usages) / seconds


def _overheads(llm: LLM, run: Callable[[], object]) -> dict[str, float]:
    """Microseconds a step of `run` spends on each part; `handoff` is waiting while no stage computes."""
    before = llm.stats()
    run()
    after = llm.stats()
    times = {key: after["times"][key] - before["times"][key] for key in before["times"]}
    busy = sum(worker["busy_s"] for worker in after["workers"]) - sum(
        worker["busy_s"] for worker in before["workers"]
    )
    seconds = {
        "schedule": times["schedule_s"],
        "submit": times["submit_s"],
        "compute": busy,
        "handoff": max(times["wait_s"] - busy, 0.0),
        "complete": times["complete_s"],
        "detokenize and deliver": times["deliver_s"],
    }
    return {name: 1e6 * value / times["steps"] for name, value in seconds.items()}


def _show(report: Report, n_prompt: int, n_tokens: int, n_sequences: int) -> None:
    table = Table(title="Throughput", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rates = report.throughput
    table.add_row("load", f"{report.load_s:.2f} s")
    table.add_row(f"prompt of {n_prompt} tokens", f"{rates.prompt:.1f} tok/s")
    table.add_row(f"decode {n_tokens} tokens", f"{rates.decode:.1f} tok/s")
    table.add_row(f"decode {n_sequences} sequences together", f"{rates.batch:.1f} tok/s")
    table.add_row("weights read for a token", format_bytes(report.bytes_per_token))
    if report.bandwidth is not None:
        table.add_row("memory reads at", f"{report.bandwidth / 1e9:.1f} GB/s")
        table.add_row("decode uses of that", f"{report.bandwidth_share:.0%}")
    table.add_row("workers hold", " + ".join(map(format_bytes, report.worker_bytes)))
    overheads = Table(title="One decode step", title_justify="left")
    overheads.add_column("part")
    overheads.add_column("microseconds", justify="right")
    for name, value in report.overheads_us.items():
        overheads.add_row(name, f"{value:,.0f}")
    console = Console()
    console.print(table)
    console.print(overheads)
