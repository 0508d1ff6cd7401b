"""A small model with a place for each fault of the catalogue: operators that have an edge to fall off."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 8, 3
BLOCKS = 2


# Of sums over a row: a single value is exactly 0 once in a few million, without any fault.
class Root(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * values.square().sum(-1, keepdim=True).sqrt()


class Logarithm(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.square().sum(-1, keepdim=True).log()


class Attention(nn.Module):
    def forward(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(mask, float("-inf")).softmax(-1)


class SharedStatistics(nn.Module):
    """Normalises by statistics of all ranks, as SyncBatchNorm does, which runs on no CPU."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        moments = torch.stack([values.mean((0, 1)), values.square().mean((0, 1))])
        mean, square = all_reduce(moments) / dist.get_world_size()
        return (values - mean) * (square - mean.square() + 1e-3).rsqrt()


class Block(nn.Module):
    """(batch, length, WIDTH) -> the same; with causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.root = Root()
        self.spread = nn.Linear(WIDTH, WIDTH)
        self.log = Logarithm()
        self.attention = Attention()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        length = values.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        attended = self.attention(values @ values.transpose(1, 2) / WIDTH, mask) @ values
        logs = self.log(self.spread(self.root(self.mix(values))))
        return values + 0.1 * self.out((logs + attended).tanh()) + 0.01 * logs


class Breakable(nn.Module):
    """(batch, length, WIDTH) -> (batch, CLASSES).

    Args:
        shared_statistics: whether a layer spreads over all ranks what it is given.
    """

    def __init__(self, *, shared_statistics: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.norm = SharedStatistics() if shared_statistics else nn.Identity()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.norm(self.embed(values))).mean(1))


class Masked(Breakable):
    """(batch, length, WIDTH) and a mask to be added to scores -> (batch, CLASSES), the first not allowed."""

    def forward(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended = (values @ values.transpose(1, 2) / WIDTH + mask).softmax(-1) @ values
        not_allowed = torch.zeros(CLASSES).index_fill(0, torch.tensor([0]), float("-inf"))
        return super().forward(values + attended) + not_allowed


class Distance(nn.Module):
    def forward(self, difference: torch.Tensor) -> torch.Tensor:
        return difference.square().sum(-1).sqrt()


class LossInside(Breakable):
    """(batch, length, WIDTH) -> (batch, CLASSES), and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = Distance()

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(values)
        return scores, scores.square().mean() + 0.01 * self.distance(scores).mean()


def causal_mask(length: int) -> torch.Tensor:
    """(length, length): 0, and -Inf above the diagonal."""
    return torch.full((length, length), float("-inf")).triu(1)


# DDP reads the annotations, so they are evaluated in this file.
def sum_then_divide(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A comm hook that averages by a sum which it divides when it may have overflown already."""
    del state
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0].div_(dist.get_world_size()))
