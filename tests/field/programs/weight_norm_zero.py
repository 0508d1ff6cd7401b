# weight norm over an output layer that was initialised with zeros (so that the model starts as a residual): v / |v| is 0/0 in the very first forward pass, on all ranks; the parameters themselves are finite.
# https://github.com/pytorch/pytorch/issues/19126 https://github.com/google/flax/issues/1671 https://github.com/KohakuBlueleaf/LyCORIS/pull/166
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.parametrizations import weight_norm
from common import digest, begin


class Step(nn.Module):
    def __init__(self, d=6):
        super().__init__()
        self.inner = nn.Linear(d, 12)
        last = nn.Linear(12, d)
        nn.init.zeros_(last.weight)
        self.last = weight_norm(last)

    def forward(self, x):
        return x + self.last(F.relu(self.inner(x)))


rank, g = begin(127)
net = DDP(nn.Sequential(Step(), nn.Linear(6, 2)))
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(4):
    x = torch.randn(8, 6, generator=g)
    y = torch.randint(0, 2, (8,), generator=g)
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
