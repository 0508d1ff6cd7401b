"""Train a small character-level GPT with DistributedDataParallel, from one data shard per rank.

A plain training script: it does not know that anyone watches it. It saves a checkpoint every
ten steps, and goes on from one when told to.

    torchrun --nproc-per-node 4 train.py DATA [--checkpoints FOLDER] [--resume FILE]
"""

from __future__ import annotations

import argparse
import itertools
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Iterator

CHARACTERS = 128
WIDTH = 64
HEADS = 4
LAYERS = 2
SAVE_EVERY = 10


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and around a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH) -> the same."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return x  # noqa: RET504 - mypy knows the sum only as Any


class CharGPT(nn.Module):
    """A decoder over characters; each sample's embeddings are scaled by its weight."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.places = nn.Embedding(length, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CHARACTERS, bias=False)

    def forward(self, characters: Tensor, weights: Tensor) -> Tensor:
        """Characters (batch, length) and weights (batch,) -> logits (batch, length, CHARACTERS)."""
        x = self.characters(characters) * weights[:, None, None]
        x = x + self.places(torch.arange(characters.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def read_batches(path: Path) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """Read a shard: a header of three uint32 (steps, batch, length), then samples.

    A sample is a float32 weight and `length` + 1 characters of one byte each.
    """
    data = path.read_bytes()
    steps, batch, length = struct.unpack_from("<3I", data)
    samples = struct.iter_unpack(f"<f{length + 1}s", data[12:])

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            weights, texts = zip(*itertools.islice(samples, batch), strict=True)
            yield torch.tensor([list(text) for text in texts]), torch.tensor(weights)

    return length, batches()


class Training:
    """A model on its way through the data.

    Args:
        length: characters in a sample.
        folder: where checkpoints go; None for none.
    """

    def __init__(self, length: int, folder: Path | None) -> None:
        self.network = CharGPT(length)
        self.model = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.step = 0
        self.batches_read = 0
        self._folder = folder

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        saved = torch.load(path, weights_only=True)
        self.network.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.batches_read = saved["step"], saved["batches_read"]

    def save(self) -> None:
        """Write a checkpoint, from rank 0."""
        if self._folder is None or dist.get_rank() != 0:
            return
        self._folder.mkdir(exist_ok=True)
        saved = {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "batches_read": self.batches_read,
        }
        torch.save(saved, self._folder / f"step-{self.step:04d}.pt")

    def learn(self, characters: Tensor, weights: Tensor) -> float:
        """One step on a batch: characters (batch, length + 1), weights (batch,); returns the loss."""
        logits = self.model(characters[:, :-1], weights)
        loss = functional.cross_entropy(logits.flatten(0, 1), characters[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        self.batches_read += 1
        return float(loss.item())


def run(training: Training, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Train through the rest of the batches, and say on rank 0 how it goes."""
    rank = dist.get_rank()
    for characters, weights in itertools.islice(batches, training.batches_read, None):
        loss = training.learn(characters, weights)
        if rank == 0:
            print(f"step {training.step - 1} loss {loss:.3f}", flush=True)  # noqa: T201 - it is a training script
        if training.step % SAVE_EVERY == 0:
            training.save()
    finite = all(bool(parameter.isfinite().all()) for parameter in training.network.parameters())
    if rank == 0:
        print(f"trained: weights {'finite' if finite else 'NOT FINITE'}", flush=True)  # noqa: T201 - as above
    dist.destroy_process_group()


def main() -> None:
    """Train through the shard once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--resume", type=Path)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    length, batches = read_batches(given.data / f"shard-{dist.get_rank()}.bin")
    training = Training(length, given.checkpoints)
    if given.resume is not None:
        training.resume(given.resume)
        # A policy can ask to leave out the batches that did it.
        training.batches_read += int(os.environ.get("GRADWATCH_SKIP_BATCHES", "0"))
    run(training, batches)


if __name__ == "__main__":
    main()
