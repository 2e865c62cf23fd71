"""Trains the demo model and writes it as a GGUF: `python train.py [--out FILE] [--steps N]`. Half an hour on two cores.

Everything comes from the seed: the documents, the vocabulary, the first weights and their order. What is left to the
machine is the order in which its cores add numbers, so another run gives another file with the same vocabulary and
nearly the same loss.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import export
import tokens
import torch
import torch.nn.functional as F
from corpus import SEED
from network import Llama, Shape
from sentencepiece import SentencePieceProcessor
from torch import Tensor

HELD_OUT_BATCHES = 24
BATCH = 4096  # tokens in a step
# Most of the reading is in short windows, which cost less; every few steps in long ones, for long conversations.
SHORT, LONG, LONG_EVERY = 256, 2048, 5
RATE_HIDDEN, RATE_OTHER = 0.02, 4e-3
WARMUP = 60
LOG_EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo.gguf"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"there is no folder {options.out.parent}")
    torch.manual_seed(int.from_bytes(hashlib.sha256(SEED.encode()).digest()[:8]) >> 1)
    torch.set_num_threads(options.threads)
    say = timed()

    machine = f"{platform.machine()}, Python {platform.python_version()}"
    say(f"torch {torch.__version__}, {options.threads} threads, {machine}")
    vocabulary = tokens.trained()
    say(f"vocabulary of {vocabulary.get_piece_size()} pieces, sha256 {tokens.digest(vocabulary)}")

    model = Llama(Shape(vocabulary=vocabulary.get_piece_size()))
    say(f"{sum(weight.numel() for weight in model.parameters()):,} weights")
    fit(model, Reading(vocabulary, f"{SEED}/training"), options.steps, say)
    say(f"held-out loss {loss_over(model, Reading(vocabulary, f'{SEED}/held out')):.4f} per token")
    size = export.write(options.out, model.eval(), vocabulary)
    say(f"{options.out}: {size:,} bytes")


def timed() -> Callable[[str], None]:
    began = time.monotonic()
    return lambda text: print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)


# ---------------------------------------------------------------- what is read


class Reading:
    """Documents, one after the other. A row begins where a document does: a question that was cut off has no answer."""

    def __init__(self, vocabulary: SentencePieceProcessor, seed: str) -> None:
        self._vocabulary = vocabulary
        self._seed = seed
        self._documents = 0

    def batch(self, length: int, rows: int) -> tuple[Tensor, Tensor]:
        """What is read, and what comes next: -100 where that is not to be learnt."""
        read, target = zip(*(self._row(length) for _ in range(rows)), strict=True)
        return torch.tensor(read), torch.tensor(target)

    def _row(self, length: int) -> tuple[list[int], list[int]]:
        said: list[int] = []
        learnt: list[bool] = []
        while len(said) <= length:
            ids, marks = tokens.encoded(corpus.document(self._seed, self._documents), self._vocabulary)
            self._documents += 1
            said += ids
            learnt += marks
        after = zip(said[1 : length + 1], learnt[1 : length + 1], strict=True)
        return said[:length], [number if mark else -100 for number, mark in after]


# ---------------------------------------------------------------- how it learns


def loss_of(model: Llama, read: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(read)
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=-100)


def fit(model: Llama, text: Reading, steps: int, say: Callable[[str], None]) -> None:
    """Muon for the matrices between the layers, AdamW for the rest; the rate rises, then falls to nothing."""
    hidden = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and name.startswith("blk")]
    other = [weight for name, weight in model.named_parameters() if weight.dim() == 1 or not name.startswith("blk")]
    optimizers = [
        torch.optim.Muon(hidden, lr=RATE_HIDDEN, weight_decay=0.01),
        torch.optim.AdamW(other, lr=RATE_OTHER, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    first = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    recent = 0.0
    for step in range(steps):
        length = LONG if step % LONG_EVERY == 0 else SHORT
        share = min(1.0, (step + 1) / WARMUP) * min(1.0, (steps - step) / (steps * 0.6))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, first, strict=True):
            group["lr"] = rate * share
        loss = loss_of(model, *text.batch(length, BATCH // length))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if not recent else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % LOG_EVERY == 0:
            say(f"step {step + 1:5}  loss {recent:.4f}")


def loss_over(model: Llama, text: Reading) -> float:
    total = count = 0.0
    with torch.no_grad():
        for _ in range(HELD_OUT_BATCHES):
            read, target = text.batch(SHORT, BATCH // SHORT)
            known = int((target != -100).sum())
            total += loss_of(model, read, target).item() * known
            count += known
    return total / count


if __name__ == "__main__":
    main()
