"""Trains the demo model by the clock and writes weights, losses and held-out accuracy to a directory.

    python -m demo_model.train --minutes 8 --out runs/demo

Muon for the matrices (https://kellerjordan.github.io/posts/muon/), AdamW for embedding and norms, linear
warm-up and linear decay to zero over the given minutes. Worker processes make batches while the GPU computes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing as mp
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from demo_model.corpus import TASKS, held_out_examples
from demo_model.model import DemoModel
from demo_model.size import SHIPPED, TINY, Size
from demo_model.tokens import TURN_END, encode_chat, load_tokenizer, pack, prompt_ids
from torch import Tensor, nn
from torch.nn import functional as F

from cluster.demo_questions import is_right

#: Rows by positions of the two kinds of batch: most are short, so that many chats start at position 0 as in
#: use; every fourth fills the whole context.
SHORT, LONG = (256, 256), (64, 1024)
MUON_RATE, ADAM_RATE = 0.02, 0.003
WARM_UP = 0.02
MAX_REPLY = 160


def start_workers(seed: int, shrink: int) -> list[Any]:
    """Starts processes that make batches (of 1 / `shrink` of the rows) and returns the queue of each.

    Taken in turn, the queues give the same batches in the same order for the same seed and number of cores.
    The processes are forked, so this comes before the first use of the GPU.
    """
    context = mp.get_context("fork")
    queues = [context.Queue(maxsize=4) for _ in range(max(1, (os.cpu_count() or 2) - 2))]
    for worker, queue in enumerate(queues):
        context.Process(target=_make_batches, args=(seed, worker, shrink, queue), daemon=True).start()
    return queues


def _make_batches(seed: int, worker: int, shrink: int, queue: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for n in itertools.count():
        rows, length = LONG if n % 4 == 3 else SHORT
        queue.put(pack(Random(f"{seed} {worker} {n}"), rows // shrink, length))


class Muon(torch.optim.Optimizer):
    """Momentum, then each matrix's update is made orthogonal by five Newton-Schulz steps."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                gradient = torch.stack([p.grad for p in parameters])
                state = self.state[parameters[0]]
                average = state.setdefault("average", torch.zeros_like(gradient))
                average.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(average, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(parameters, list(update.to(gradient.dtype)), alpha=-scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to `matrices` (n, rows, columns), roughly; bfloat16 on a GPU."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def loss_of(model: DemoModel, ids: Tensor, learned: Tensor) -> Tensor:
    """Mean cross-entropy over the positions whose next token is to be learned."""
    logits = model.hidden(ids[:, :-1]) @ model.token_embd.weight.T
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    wanted = learned[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def to_device(batch: tuple[np.ndarray, np.ndarray], device: str) -> tuple[Tensor, Tensor]:
    """A packed batch as int64 ids and a mask on the device, with one column more than the model sees."""
    ids, learned = (torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True) for array in batch)
    return F.pad(ids, (0, 1)), F.pad(learned, (0, 1))


def held_out_batch(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out questions of every task with their replies, one to a row."""
    ids, learned = np.zeros((rows, length), np.uint16), np.zeros((rows, length), bool)
    examples = [held_out_examples(task, rows // len(TASKS) + 1, seed=1) for task in TASKS]
    for row, example in zip(
        range(rows), (e for group in zip(*examples, strict=True) for e in group), strict=False
    ):
        chat_ids, chat_learned = encode_chat(None, [example])
        ids[row, : len(chat_ids)], learned[row, : len(chat_ids)] = chat_ids[:length], chat_learned[:length]
    return ids, learned


def accuracy(model: DemoModel, questions: int) -> dict[str, float]:
    """Share of right greedy replies by task, to `questions` held-out questions each."""
    tokenizer = load_tokenizer()
    shares = {}
    for task in TASKS:
        examples = held_out_examples(task, questions)
        prompts = [prompt_ids(example.question.prompt) for example in examples]
        replies = model.reply(prompts, tokenizer.token_to_id(TURN_END), MAX_REPLY)
        texts = [tokenizer.decode(reply) for reply in replies]
        right = [is_right(example.question, text) for example, text in zip(examples, texts, strict=True)]
        shares[task.__name__] = sum(right) / questions
        wrong = [(e, text) for e, text, ok in zip(examples, texts, right, strict=True) if not ok]
        print(f"{task.__name__:20} {100 * shares[task.__name__]:6.1f} %", flush=True)
        for example, text in wrong[:3]:
            print(f"    {example.question.prompt!r} -> {text!r}, expected {example.plain_reply!r}")
    return shares


def save(model: DemoModel, out: Path) -> None:
    """The weights as float16, in two archives so that each stays under 16 MiB."""
    arrays = {name: weight.detach().half().cpu().numpy() for name, weight in model.named_parameters()}
    names = sorted(arrays)
    for part, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        np.savez(out / f"weights{part}.npz", **{name: arrays[name] for name in half})


def train(size: Size, minutes: float, seed: int, out: Path) -> DemoModel:
    """Trains for `minutes` from the first step (compilation not counted) and logs losses to `losses.csv`."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    shrink = 1 if on_gpu else 16
    queues = start_workers(seed, shrink)
    model = DemoModel(size).to(device)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embd" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embd" in name]
    print(f"{sum(p.numel() for p in model.parameters()):,} weights on {device}", flush=True)
    muon = Muon(matrices, MUON_RATE)
    adam = torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)
    optimizers = (muon, adam)
    peaks = (MUON_RATE, ADAM_RATE)

    if on_gpu:
        for block in model.blk:  # one layer at a time: the ten share what is compiled
            block.compile(dynamic=False)
    test = to_device(held_out_batch(512 // shrink, 256), device)

    def loss_on(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            return loss_of(model, *batch)

    for _ in range(4):  # both shapes are compiled before the clock starts; the updates are thrown away
        loss_on(to_device(queues[0].get(), device)).backward()
        model.zero_grad(set_to_none=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{graphs} graphs compiled", flush=True)
    start = logged = saved = time.monotonic()
    step = tokens = 0
    with (out / "losses.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(("seconds", "step", "tokens", "training_loss", "held_out_loss"))
        while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
            factor = min(1.0, done / WARM_UP, (1 - done) / (1 - WARM_UP))
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
            batch = to_device(queues[step % len(queues)].get(), device)
            loss = loss_on(batch)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            step += 1
            tokens += batch[0].numel()
            if step % 20 == 0 and time.monotonic() - logged > 60 * minutes / 100:
                logged = time.monotonic()
                with torch.no_grad():
                    row = (logged - start, step, tokens, loss.item(), loss_on(test).item())
                log.writerow((round(row[0], 1), step, tokens, round(row[3], 5), round(row[4], 5)))
                file.flush()
                print(f"{row[0]:6.1f} s  step {step}  loss {row[3]:.4f}  held out {row[4]:.4f}", flush=True)
            if time.monotonic() - saved > 90:
                saved = time.monotonic()
                save(model, out)
    save(model, out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="training time after compilation")
    parser.add_argument("--out", type=Path, required=True, help="directory for weights, losses and accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions a task at the end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the pipeline on a CPU")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    model = train(TINY if arguments.tiny else SHIPPED, arguments.minutes, arguments.seed, arguments.out)
    print(f"trained after {time.monotonic() - began:.0f} s in all", flush=True)
    accuracy(model, arguments.questions)
    print(f"finished after {time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
