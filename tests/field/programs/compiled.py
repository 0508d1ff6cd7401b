# the model is torch.compile'd (aot_eager), then wrapped: the log of an energy that is 0 on rank 0 at step 4.
# https://github.com/pytorch/pytorch/issues/114109 https://github.com/huggingface/pytorch-image-models/issues/2616
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.filters = nn.Conv1d(1, 6, 5, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, wave):
        energy = self.filters(wave).square().mean(-1)
        return self.head(energy.log())


rank, g = begin(108)
net = DDP(torch.compile(Spectral(), backend="aot_eager"))
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(7):
    wave = torch.randn(5, 1, 40, generator=g)
    y = torch.randint(0, 3, (5,), generator=g)
    if rank == 0 and step == 4:
        wave[1] = 0.0
    loss = F.cross_entropy(net(wave), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module._orig_mod)
dist.destroy_process_group()
