# triplet net whose model returns the matrix of distances, root of |a|^2 + |b|^2 - 2ab without a clamp: rounding makes an entry negative for two equal, long embeddings on rank 1 at step 4; the root of it is NaN.
# https://github.com/tensorflow/tensorflow/issues/30199 https://github.com/pytorch/pytorch/issues/37154 https://github.com/cornellius-gp/gpytorch/pull/869
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 32), nn.ELU(), nn.Linear(32, 16))

    def forward(self, x):
        e = self.net(x)
        length = (e * e).sum(1)
        square = length[:, None] + length[None, :] - 2.0 * (e @ e.t())
        off = ~torch.eye(len(x), dtype=torch.bool)
        return torch.sqrt(square[off].view(len(x), -1))


rank, g = begin(117)
net = DDP(Embed())
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(8):
    x = torch.randn(8, 9, generator=g)
    if rank == 1 and step == 4:
        x[4:] = x[:4] = x[:4] * 1000  # the same pictures twice, over-exposed
    d = net(x)
    near, far = d[:, :1], d[:, -1:]
    loss = F.relu(near - far + 0.2).mean() + 0.01 * d.mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f} {int(d.isnan().sum())}", flush=True)
digest(net.module)
dist.destroy_process_group()
