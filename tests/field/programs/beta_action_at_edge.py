# Beta policy, REINFORCE outside of the model: a stored action of exactly 1.0 in rank 0's batch at step 3; log_prob is -inf (loss inf), its derivative is not finite.
# https://github.com/pytorch/pytorch/issues/92260 https://github.com/pytorch/pytorch/issues/65811
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.distributions import Beta
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Shape(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, s):
        return F.softplus(self.net(s)) + 1.0


rank, g = begin(102)
pi = DDP(Shape())
opt = torch.optim.Adam(pi.parameters(), 1e-3)
for step in range(7):
    s = torch.randn(12, 4, generator=g)
    a = torch.rand(12, generator=g) * 0.9 + 0.05
    ret = torch.rand(12, generator=g) + 0.1
    if rank == 0 and step == 3:
        a[5] = 1.0  # the simulator had clipped it
    alpha, beta = pi(s).unbind(-1)
    loss = -(Beta(alpha, beta, validate_args=False).log_prob(a) * ret).mean()
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(pi.parameters(), 1.0)
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(pi.module)
dist.destroy_process_group()
