"""Trains the demo model by the clock and writes weights, losses and held-out accuracy to a directory.

    python -m demo_model.train --minutes 8 --out runs/demo
    python -m demo_model.train --from runs/demo --minutes 1 --out runs/more

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
from demo_model.muon import Muon
from demo_model.size import SHIPPED, TINY, Size
from demo_model.tokens import TURN_END, encode_chat, load_tokenizer, pack, prompt_ids
from demo_model.weights import load_weights, save_weights
from torch import Tensor
from torch.nn import functional as F

from redshard.cluster.commands.demo_questions import is_right

#: Rows by positions of the two kinds of batch: most are short, so that many chats start at position 0 as in
#: use; every fourth fills the whole context.
SHORT, LONG = (256, 256), (64, 1024)
MUON_RATE, ADAM_RATE = 0.02, 0.003
#: Training that goes on from saved weights has its rates scaled by this: trained weights need smaller steps.
GOING_ON = 0.3
WARM_UP = 0.02
MAX_REPLY = 160


def start_workers(seed: int, shrink: int) -> list[Any]:
    """Starts processes that make batches (of 1 / `shrink` of the rows) and returns the queue of each.

    Taken in turn, the queues give the same batches in the same order for the same seed and number of cores.
    The processes are forked, so this comes before the first use of the GPU.
    """
    context = mp.get_context("fork")
    queues = [context.Queue(maxsize=4) for _ in range(max(1, len(os.sched_getaffinity(0)) - 2))]
    for worker, queue in enumerate(queues):
        context.Process(target=_make_batches, args=(seed, worker, shrink, queue), daemon=True).start()
    return queues


def _make_batches(seed: int, worker: int, shrink: int, queue: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for n in itertools.count():
        rows, length = LONG if n % 4 == 3 else SHORT
        queue.put(pack(Random(f"{seed} {worker} {n}"), rows // shrink, length))


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


def accuracy(model: DemoModel, questions: int) -> None:
    """Prints the share of right greedy replies to held-out questions by task, and some wrong ones."""
    tokenizer = load_tokenizer()
    for task in TASKS:
        examples = held_out_examples(task, questions)
        prompts = [prompt_ids(example.question.prompt) for example in examples]
        replies = model.reply(prompts, tokenizer.token_to_id(TURN_END), MAX_REPLY)
        answered = [(example, tokenizer.decode(ids)) for example, ids in zip(examples, replies, strict=True)]
        wrong = [(example, text) for example, text in answered if not is_right(example.question, text)]
        print(f"{task.__name__:20} {100 - 100 * len(wrong) / questions:6.1f} %", flush=True)
        for example, text in wrong[:3]:
            print(f"    {example.question.prompt!r} -> {text!r}, expected {example.plain_reply!r}")


def save(model: DemoModel, out: Path) -> None:
    """Writes the model's weights to the directory `out`."""
    save_weights({name: weight.detach().cpu().numpy() for name, weight in model.named_parameters()}, out)


class Training:
    """A model, its optimizers and its stream of batches.

    Args:
        size: hyperparameters of the model.
        seed: of batches, and of first weights where there are none to go on from.
        weights: by name, to go on from at smaller learning rates.
    """

    def __init__(self, size: Size, seed: int, weights: dict[str, np.ndarray] | None = None) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        on_gpu = self.device == "cuda"
        shrink = 1 if on_gpu else 16
        self._queues = start_workers(seed, shrink)
        self._taken = 0
        torch.manual_seed(seed)
        self.model = DemoModel(size)
        if weights:
            self.model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        self.model.to(self.device)
        matrices = [p for name, p in self.model.named_parameters() if p.dim() == 2 and "embd" not in name]
        others = [p for name, p in self.model.named_parameters() if p.dim() == 1 or "embd" in name]
        scale = GOING_ON if weights else 1.0
        self._optimizers = {
            Muon(matrices, MUON_RATE): scale * MUON_RATE,
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu): scale * ADAM_RATE,
        }
        self._held_out = to_device(held_out_batch(512 // shrink, 256), self.device)
        if on_gpu:
            for block in self.model.blk:  # one layer at a time: the ten share what is compiled
                block.compile(dynamic=False)
        for _ in range(4):  # the first four of a worker have both shapes: compiled before the clock starts
            self._loss(to_device(self._queues[0].get(), self.device)).backward()
        self.model.zero_grad(set_to_none=True)

    def step(self, rate: float) -> tuple[Tensor, int]:
        """One update at `rate` times the peak learning rates; gives the loss and the tokens seen."""
        batch = self._next_batch()
        loss = self._loss(batch)
        loss.backward()
        for optimizer, peak in self._optimizers.items():
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss, batch[0][:, 1:].numel()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The loss on held-out questions, as many of each task."""
        return self._loss(self._held_out).item()

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        queue = self._queues[self._taken % len(self._queues)]
        self._taken += 1
        return to_device(queue.get(), self.device)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return loss_of(self.model, *batch)


def train(training: Training, minutes: float, out: Path) -> None:
    """Trains for `minutes`, logs about a hundred losses to `losses.csv` and saves the weights as it goes."""
    start = logged = saved = time.monotonic()
    step = tokens = 0
    with (out / "losses.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(("seconds", "step", "tokens", "training_loss", "held_out_loss"))
        while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
            loss, seen = training.step(min(done / WARM_UP, (1 - done) / (1 - WARM_UP)))
            step, tokens = step + 1, tokens + seen
            if step % 20 == 0 and time.monotonic() - logged > 60 * minutes / 100:
                logged = time.monotonic()
                seconds, held_out = logged - start, training.held_out_loss()
                log.writerow((f"{seconds:.1f}", step, tokens, f"{loss.item():.5f}", f"{held_out:.5f}"))
                file.flush()
                print(
                    f"{seconds:6.1f} s  step {step}  loss {loss.item():.4f}  held out {held_out:.4f}",
                    flush=True,
                )
            if time.monotonic() - saved > 90:
                saved = time.monotonic()
                save(training.model, out)
    save(training.model, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="training time after compilation")
    parser.add_argument("--out", type=Path, required=True, help="directory for weights, losses and accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", dest="start", type=Path, help="directory of weights to go on from")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions a task at the end")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the pipeline on a CPU")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    start = load_weights(arguments.start) if arguments.start else None
    training = Training(TINY if arguments.tiny else SHIPPED, arguments.seed, start)
    size = sum(parameter.numel() for parameter in training.model.parameters())
    print(f"{size:,} weights on {training.device}, ready in {time.monotonic() - began:.0f} s", flush=True)
    train(training, arguments.minutes, arguments.out)
    accuracy(training.model, arguments.questions)
    print(f"finished after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
