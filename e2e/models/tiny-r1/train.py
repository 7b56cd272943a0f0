"""Trains tiny-r1 on generated questions; seeded, resumable, bounded in time.

The learning rate follows a cosine over the planned time, not over steps, so that a slower or shared machine still ends with a small
one. Every `--exam-every` seconds the averaged weights take an exam on held-out problems: an answer counts when the greedy token is
the expected one at every position, which is the same as greedy decoding giving exactly the expected text. The share of each
form in the next batches follows its error. Products run in bfloat16; weights, norms, gate and softmax in float32.

usage: python train.py --work FOLDER --minutes 60      (call it again to resume)
       python train.py --work FOLDER --smoke           (a few steps, for tests)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # The default forgets compiled shapes; must be set before torch.

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

import tasks
import tokenizer
from model import Buckets, Shape, TinyR1
from optimizer import Muon
from tasks import Form

EOS_ID, PAD_ID = 1, 2
IGNORED = -100
BUCKETS = 4
"""Rectangles a batch is cut into."""
LENGTH_MULTIPLE = 8
LABELS_MULTIPLE = 64
"""Sizes are rounded up to these, because oneDNN compiles a program for every new shape."""
BASE_SHARES = {Form.SUM: 0.18, Form.DIFFERENCE: 0.24, Form.PRODUCT: 0.18, Form.COUNT: 0.3, Form.OTHER: 0.1}
EMA_DECAY = 0.995
BALANCE_SPEED = 1e-3


@dataclass
class Progress:
    """What a resumed run must know beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=lambda: {form.value: 1.0 for form in Form})


def encode(examples: list[tasks.Example], encoder: Tokenizer) -> list[tuple[list[int], int]]:
    """Token ids of each whole conversation, and the number of them that are prompt."""
    prompts = encoder.encode_batch_fast([example.prompt() for example in examples], add_special_tokens=False)
    completions = encoder.encode_batch_fast([example.completion() for example in examples], add_special_tokens=False)
    return [(prompt.ids + completion.ids, len(prompt.ids)) for prompt, completion in zip(prompts, completions)]


def rounded(size: int, multiple: int) -> int:
    """The size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def collate(rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Inputs and next-token labels, both [rows, length] with a rounded length; only the completion is labelled."""
    length = rounded(max(len(ids) for ids, _ in rows) - 1, LENGTH_MULTIPLE)
    inputs = torch.full((len(rows), length), PAD_ID)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (ids, prompt) in enumerate(rows):
        line = torch.tensor(ids)
        inputs[row, : len(ids) - 1] = line[:-1]
        labels[row, prompt - 1 : len(ids) - 1] = line[prompt:]
    return inputs, labels


@dataclass
class Batch:
    """A flat batch: next-token labels for the ids of all buckets."""

    ids: Tensor
    labels: Tensor
    buckets: Buckets


def cut(rows: list[tuple[list[int], int]]) -> Batch:
    """Sorts conversations by length and cuts them into buckets, so that little is padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    size = -(-len(rows) // BUCKETS)
    rectangles = [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    ids, labels = (torch.cat([part.flatten() for part in parts]) for parts in zip(*rectangles))
    return Batch(ids, labels, [tuple(inputs.shape) for inputs, _ in rectangles])


def draw_batch(seed: int, size: int, encoder: Tokenizer, progress: Progress) -> Batch:
    """The batch of this step; the random generator is seeded by the step, so a resumed run does not repeat examples."""
    rng = random.Random(f"{seed}:{progress.step}")
    shares = [BASE_SHARES[form] * (0.3 + progress.errors[form.value]) for form in Form]
    return cut(encode([tasks.generate(form, rng, "train") for form in rng.choices(list(Form), shares, k=size)], encoder))


@torch.no_grad()
def exam(model: TinyR1, encoder: Tokenizer, count: int, seed: int = 7) -> dict[str, float]:
    """The share of held-out examples of each form that greedy decoding would answer with exactly the expected text."""
    scores = {}
    for form in Form:
        rng = random.Random(f"exam:{seed}:{form.value}")
        rows = encode([tasks.generate(form, rng, "held_out") for _ in range(count)], encoder)
        rows.sort(key=lambda row: len(row[0]))
        right = 0
        for start in range(0, count, 25):
            inputs, labels = collate(rows[start : start + 25])
            right += int(((model(inputs).argmax(-1) == labels) | (labels == IGNORED)).all(-1).sum())
        scores[form.value] = right / count
    return scores


def learning_rate(peak: float, step: int, elapsed: float, planned: float) -> float:
    """Linear warm-up over 100 steps, then a cosine over the planned seconds down to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(elapsed / planned, 1.0)))
    return peak * min(1.0, (step + 1) / 100) * (0.98 * cosine + 0.02)


def make_optimizers(model: TinyR1, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for embedding, head, gates and norms."""
    named = list(model.named_parameters())
    inner = [weight for name, weight in named if weight.dim() > 1 and name.startswith("layers") and ".gate.weight" not in name]
    taken = {id(weight) for weight in inner}
    outer = [weight for _, weight in named if id(weight) not in taken]
    adam = torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.0, fused=True)
    return [Muon(inner, lr=peak), adam]


@dataclass
class Run:
    """One training run: the model, its moving average and optimizer, and where they are kept."""

    model: TinyR1
    average: TinyR1
    optimizers: list[torch.optim.Optimizer]
    progress: Progress
    checkpoint: Path

    def save(self) -> None:
        """Writes the checkpoint through a temporary file, so that a kill never leaves half of one."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": vars(self.progress),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> None:
        """Continues from the checkpoint if there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(kept)
            for name, value in state["progress"].items():
                setattr(self.progress, name, value)

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the averaged weights; early on the average is short, so that it does not lag behind."""
        decay = min(EMA_DECAY, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        for averaged, moe in zip(self.average.moe_layers(), self.model.moe_layers()):
            averaged.gate.e_score_correction_bias.copy_(moe.gate.e_score_correction_bias)


def start(args: argparse.Namespace) -> Run:
    """A fresh or resumed run."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model, average = TinyR1(Shape()), TinyR1(Shape())
    average.load_state_dict(model.state_dict())
    args.work.mkdir(parents=True, exist_ok=True)
    run = Run(model, average, make_optimizers(model, args.peak), Progress(), args.work / "checkpoint.pt")
    run.resume()
    return run


def step_once(run: Run, batch: Batch, rate: float) -> float:
    """One update; returns the loss."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    wanted = (batch.labels != IGNORED).nonzero().squeeze(1)
    # The first position is never labelled, so repeating it rounds the size without changing the loss.
    wanted = F.pad(wanted, (0, rounded(len(wanted), LABELS_MULTIPLE) - len(wanted)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = run.model.lm_head(run.model.hidden(batch.ids, batch.buckets).index_select(0, wanted))
    loss = F.cross_entropy(logits.float(), batch.labels.index_select(0, wanted))
    run.model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    run.model.balance(BALANCE_SPEED)
    run.follow()
    run.progress.step += 1
    return loss.item()


def train(args: argparse.Namespace) -> None:
    """Trains until the planned time or step count is reached."""
    encoder = Tokenizer.from_str(json.dumps(tokenizer.tokenizer_json()))
    run = start(args)
    progress, planned = run.progress, args.minutes * 60
    parameters = sum(weight.numel() for weight in run.model.parameters())
    print(f"parameters {parameters:,} start at step {progress.step} after {progress.seconds:.0f} s", flush=True)
    smooth, last_print, before = None, progress.step, time.monotonic()
    next_exam = progress.seconds + args.exam_every
    while progress.seconds < planned and progress.step < args.steps:
        rate = learning_rate(args.peak, progress.step, progress.seconds, planned)
        loss = step_once(run, draw_batch(args.seed, args.batch, encoder, progress), rate)
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        now = time.monotonic()
        progress.seconds, before = progress.seconds + now - before, now
        if progress.step - last_print >= args.print_every:
            last_print = progress.step
            print(f"step {progress.step} {progress.seconds:.0f} s loss {smooth:.4f} rate {rate:.1e}", flush=True)
        if progress.seconds >= next_exam:
            next_exam = progress.seconds + args.exam_every
            scores = exam(run.average, encoder, args.exam_count)
            progress.errors = {form: 1 - score for form, score in scores.items()}
            print(f"exam {progress.step} {scores}", flush=True)
            run.save()
    scores = exam(run.average, encoder, args.exam_count)
    run.save()
    print(f"final step {progress.step} {progress.seconds:.0f} s {scores}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=60.0, help="planned training time, resumed parts included")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after this many steps at the latest")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="1 is best beside other work: more threads wait for each other")
    parser.add_argument("--exam-every", type=float, default=120.0, help="seconds between exams")
    parser.add_argument("--exam-count", type=int, default=100, help="held-out questions of each form")
    parser.add_argument("--print-every", type=int, default=100, help="steps between lines")
    parser.add_argument("--smoke", action="store_true", help="a few steps and a small exam")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch, args.exam_count, args.print_every = 3, 4, 4, 1
    return args


if __name__ == "__main__":
    train(arguments())
