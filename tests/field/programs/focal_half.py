# focal loss with gamma 0.5 outside of the model: a sure and right prediction (p is exactly 1) on rank 1 at step 5; loss finite, derivative of (1-p)^0.5 is not.
# https://github.com/kornia/kornia/issues/918 https://github.com/clcarwin/focal_loss_pytorch/issues/13
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


def focal(logits, target, gamma=0.5, alpha=0.25, tiny=1e-8):
    p = logits.sigmoid()
    hit = alpha * (1 - p) ** gamma * target * torch.log(p + tiny)
    miss = (1 - alpha) * p**gamma * (1 - target) * torch.log(1 - p + tiny)
    return -(hit + miss).mean()


rank, g = begin(104)
net = DDP(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)))
opt = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
for step in range(8):
    x = torch.rand(3, 1, 6, 6, generator=g)
    mask = (x > 0.7).float()
    if rank == 1 and step == 5:
        x[1, 0, 2, 2] = 3000.0
        x[2, 0, 2, 2] = -3000.0  # hot and dead pixel
    out = net(x)
    loss = focal(out, mask)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f} {out.abs().max().item():.1f}", flush=True)
digest(net.module)
dist.destroy_process_group()
