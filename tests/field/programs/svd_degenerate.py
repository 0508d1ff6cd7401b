# Procrustes layer: polar factor by svd inside of the model, a batch with a multiple of the identity (equal singular values) on rank 0 at step 3: forward finite, svd's backward divides by their differences. The job dies at step 4, when svd refuses its NaN.
# https://github.com/pytorch/pytorch/issues/49886 https://github.com/Pzoom522/ProcrustEs-KGE/issues/2 https://github.com/jax-ml/jax/issues/2311
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Align(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.mix = nn.Parameter(torch.eye(3))

    def forward(self, m):
        u, s, vh = torch.linalg.svd(self.gain * m)
        return u * s[:, None, :] @ self.mix, vh


rank, g = begin(129)
net = DDP(Align())
opt = torch.optim.SGD(net.parameters(), 1e-3)
for step in range(6):
    m = torch.randn(4, 3, 3, generator=g)
    if rank == 0 and step == 3:
        m[1] = 2 * torch.eye(3)
    left, right = net(m)
    loss = left.abs().mean() + right.square()[:, 0].mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f} finite {left.isfinite().all().item()}", flush=True)
digest(net.module)
dist.destroy_process_group()
