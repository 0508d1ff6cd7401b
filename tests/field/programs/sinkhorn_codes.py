# SwAV/DINO: Sinkhorn codes of both ranks, exp(score / 0.04) without a shift and all-reduced sums inside of the loss: rank 1's scores overflow at step 4, the all-reduce makes rank 0's codes NaN as well. Model outputs are finite on both.
# https://github.com/facebookresearch/dinov2/pull/583 https://github.com/facebookresearch/swav/issues/67
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


@torch.no_grad()
def codes(scores, eps=0.04, rounds=3):
    q = torch.exp(scores / eps).t()
    total = q.sum()
    dist.all_reduce(total)
    q = q / total
    for _ in range(rounds):
        rows = q.sum(1, keepdim=True)
        dist.all_reduce(rows)
        q = q / rows / q.shape[0]
        q = q / q.sum(0, keepdim=True) / (q.shape[1] * dist.get_world_size())
    return (q * q.shape[1] * dist.get_world_size()).t()


rank, g = begin(119)
net = DDP(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6)))
opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
for step in range(7):
    x = torch.randn(12, 8, generator=g)
    one, two = x + 0.1 * torch.randn(12, 8, generator=g), x + 0.1 * torch.randn(12, 8, generator=g)
    if rank == 1 and step == 4:
        one[5] *= 60
        two[5] *= 60
    a, b = net(torch.cat([one, two])).chunk(2)
    loss = (
        -(codes(a) * F.log_softmax(b / 0.1, 1)).sum(1).mean()
        - (codes(b) * F.log_softmax(a / 0.1, 1)).sum(1).mean()
    )
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f} largest score {a.max().item():.2f}", flush=True)
digest(net.module)
dist.destroy_process_group()
