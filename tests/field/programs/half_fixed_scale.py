# a model in half precision with a loss scale of 1024 written by hand (no GradScaler, no check): a hard batch on rank 0 at step 4, the scaled loss is finite and a gradient overflows fp16 to inf on its way back.
# https://github.com/huggingface/transformers/issues/9295 https://github.com/NVIDIA/apex/issues/240 https://github.com/huggingface/transformers/issues/5651
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin

SCALE = 1024.0
rank, g = begin(123)
net = DDP(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)).half())
opt = torch.optim.SGD(net.parameters(), 1e-3)
for step in range(7):
    x = torch.randn(16, 6, generator=g)
    y = x.sum(1)
    if rank == 0 and step == 4:
        x *= 4
        y = y * 40
    loss = (net(x.half()).float().squeeze(1) - y).square().mean()
    opt.zero_grad()
    (loss * SCALE).backward()
    with torch.no_grad():
        for p in net.parameters():
            p.grad.div_(SCALE)
    opt.step()
    print(f"r{rank} {step} {loss.item():.3f}", flush=True)
digest(net.module)
dist.destroy_process_group()
