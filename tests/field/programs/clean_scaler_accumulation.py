# NOTHING bad: fp16 autocast with a GradScaler that starts far too high and finds its range, with two micro-batches of which only the second is synchronised, and a batch on rank 1 that alone overflows once more at step 9.
# https://github.com/ChenRocks/UNITER/issues/28 https://github.com/pytorch/pytorch/issues/108493
import contextlib, torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin

rank, g = begin(134)
net = DDP(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1)))
opt = torch.optim.AdamW(net.parameters(), 1e-3)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)
for step in range(16):
    for micro in range(2):
        x = torch.randn(8, 8, generator=g)
        y = x.mean(1)
        if rank == 1 and step == 9 and micro == 0:
            y = y * 3000
        with contextlib.nullcontext() if micro else net.no_sync():
            with torch.autocast("cpu", dtype=torch.float16):
                out = net(x)
            loss = (
                F.l1_loss(out.float().squeeze(1), y) if step != 9 else F.mse_loss(out.float().squeeze(1), y)
            )
            scaler.scale(loss / 2).backward()
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()
    print(f"r{rank} {step} {loss.item():.4f} scale {scaler.get_scale():.0f}", flush=True)
digest(net.module)
dist.destroy_process_group()
