# find_unused_parameters: each rank's batch goes through the expert that its domain chooses; only rank 1 uses "speech" at step 4, and that expert divides by its loudness, which is 0: forward NaN on rank 1, the expert's parameters are unused on rank 0.
# https://github.com/pytorch/pytorch/issues/41101 https://github.com/pytorch/pytorch/issues/184575 https://github.com/gesistsa/sweater/issues/41
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x / x.norm(dim=-1, keepdim=True))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleDict({"speech": Speech(), "text": Text()})
        self.head = nn.Linear(8, 4)

    def forward(self, x, domain):
        return self.head(F.silu(self.experts[domain](x)))


rank, g = begin(124)
net = DDP(Routed(), find_unused_parameters=True)
opt = torch.optim.AdamW(net.parameters(), 1e-3)
for step in range(8):
    domain = "speech" if (step + rank) % 2 else "text"  # step 4: rank 1 has speech, rank 0 text
    x = torch.randn(5, 8, generator=g)
    y = torch.randint(0, 4, (5,), generator=g)
    if rank == 1 and step == 4:
        x[3] = 0.0
    loss = F.cross_entropy(net(x, domain), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {domain} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
