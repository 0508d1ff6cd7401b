# batch norm by hand with an unbiased running variance: a batch of one on rank 1 at step 2 makes the buffer running_var NaN, nothing is bad yet; at step 5 the norm is frozen (eval) and the forward pass is NaN on rank 1. Buffers are not broadcast.
# https://github.com/facebookresearch/SparseConvNet/issues/190 https://github.com/pytorch/pytorch/issues/1206 https://github.com/digantamisra98/EvoNorm/issues/4
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class HandBatchNorm(nn.Module):
    def __init__(self, d, momentum=0.1):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))
        self.shift = nn.Parameter(torch.zeros(d))
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0), self.momentum)
        return (x - mean) / torch.sqrt(var + 1e-5) * self.scale + self.shift


rank, g = begin(121)
model = nn.Sequential(nn.Linear(6, 10), HandBatchNorm(10), nn.ReLU(), nn.Linear(10, 3))
net = DDP(model, broadcast_buffers=False)
opt = torch.optim.AdamW(net.parameters(), 1e-3)
for step in range(8):
    if step == 5:
        model[1].eval()  # fine-tuning goes on with frozen statistics
    n = 1 if rank == 1 and step == 2 else 8
    x = torch.randn(n, 6, generator=g)
    y = torch.randint(0, 3, (n,), generator=g)
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(
        f"r{rank} {step} {loss.item():.4f} running_var finite {model[1].running_var.isfinite().all().item()}",
        flush=True,
    )
digest(net.module)
dist.destroy_process_group()
