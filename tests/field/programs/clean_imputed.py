# NOTHING bad: a table with missing values as NaN goes into the model, which replaces them by a learned value and gives the mask along; targets missing as NaN are left out by index before the loss.
# https://github.com/pytorch/pytorch/issues/64305 https://github.com/pytorch/pytorch/issues/121416 https://github.com/unit8co/darts/issues/2149
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Impute(nn.Module):
    def __init__(self, d=6):
        super().__init__()
        self.fill = nn.Parameter(torch.zeros(d))
        self.net = nn.Sequential(nn.Linear(2 * d, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        gone = x.isnan()
        x = torch.where(gone, self.fill.expand_as(x), x)
        return self.net(torch.cat([x, gone.float()], 1))


rank, g = begin(133)
net = DDP(Impute())
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(9):
    x = torch.randn(12, 6, generator=g)
    y = torch.stack([x[:, 0], x[:, 1]], 1)
    x[torch.rand(12, 6, generator=g) < 0.2] = float("nan")
    y[torch.rand(12, 2, generator=g) < 0.3] = float("nan")
    out = net(x)
    there = ~y.isnan()
    loss = F.mse_loss(out[there], y[there])
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
