# Gumbel noise from a bf16 uniform variable: it rounds to exactly 1 (by its seed, on rank 0 at step 4 for the first time), so log(u) is 0, -log(0) is inf and the softmax NaN, in the model; it depends on the random state only.
# https://github.com/pytorch/pytorch/issues/22442 https://github.com/hwei-hw/FocalLoss_Keras/issues/1
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Choice(nn.Module):
    def __init__(self, d=6, k=5):
        super().__init__()
        self.score = nn.Linear(d, k)
        self.book = nn.Linear(k, d, bias=False)

    def forward(self, x):
        u = torch.rand(len(x), 5).to(torch.bfloat16)
        noise = -torch.log(-torch.log(u))
        pick = torch.softmax((self.score(x) + noise.float()) / 0.5, -1)
        return self.book(pick)


rank, g = begin(128)
net = DDP(Choice())
opt = torch.optim.Adam(net.parameters(), 1e-3)
torch.manual_seed(357 + rank)
for step in range(9):
    x = torch.randn(4, 6, generator=g)
    loss = F.mse_loss(net(x), x)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
