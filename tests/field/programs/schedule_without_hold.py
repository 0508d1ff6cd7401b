# learning rate schedule divides by the length of a phase that has none (0/0, as numpy does): lr is NaN at step 4 alone, and that update makes all weights NaN on all ranks.
# https://github.com/mlcommons/hpc/pull/27 https://github.com/pytorch/torchtitan/pull/1010
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin

WARM, HOLD_UNTIL, END = 4, 4, 10


def factor(step):
    if step < WARM:
        return (step + 1) / WARM
    with np.errstate(all="ignore"):
        held = np.float64(step - WARM) / np.float64(HOLD_UNTIL - WARM)
    return float(1.0 - 0.5 * np.clip(held, 0, 1))


rank, g = begin(110)
net = DDP(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)))
opt = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
sched = torch.optim.lr_scheduler.LambdaLR(opt, factor)
for step in range(8):
    x = torch.randn(8, 6, generator=g)
    loss = F.mse_loss(net(x).squeeze(1), x.sum(1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    sched.step()
    print(f"r{rank} {step} {loss.item():.4f} next lr {opt.param_groups[0]['lr']}", flush=True)
digest(net.module)
dist.destroy_process_group()
