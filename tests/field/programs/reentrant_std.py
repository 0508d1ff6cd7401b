# layer norm by hand (root of the variance, epsilon added after it) in a block checkpointed with use_reentrant=True: a constant row on rank 1 at step 4; forward finite, derivative of the root at 0 is not.
# https://github.com/pytorch/pytorch/issues/4320 https://github.com/harvard-edge/cs249r_book/pull/2059
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from common import digest, begin


class HandNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d))
        self.shift = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        spread = torch.sqrt(centred.square().mean(-1, keepdim=True))
        return self.gain * centred / (spread + 1e-5) + self.shift


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = HandNorm(d)
        self.up = nn.Linear(d, 2 * d)
        self.down = nn.Linear(2 * d, d)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.stem = nn.Linear(5, d, bias=False)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        h = self.stem(x)
        for b in self.blocks:
            h = checkpoint(b, h, use_reentrant=True)
        return self.head(h)


rank, g = begin(107)
net = DDP(Stack())
opt = torch.optim.AdamW(net.parameters(), 1e-3)
for step in range(8):
    x = torch.randn(6, 5, generator=g)
    y = torch.randint(0, 3, (6,), generator=g)
    if rank == 1 and step == 4:
        x[2] = 0.0  # silence: the stem has no bias
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
