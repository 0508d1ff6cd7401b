# attention by hand under fp16 autocast, no scaling before the product: a loud recording overflows q@k to inf on rank 1 at step 5 (softmax makes it NaN).
# https://github.com/plemeri/InSPyReNet/issues/36 https://github.com/flashlight/flashlight/pull/448
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Listen(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, 4)
        self.d = d

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = torch.matmul(q, k.transpose(1, 2)) / self.d**0.5
        return self.out((scores.softmax(-1) @ v).mean(1))


rank, g = begin(106)
net = DDP(Listen())
opt = torch.optim.AdamW(net.parameters(), 1e-3)
for step in range(8):
    x = torch.randn(4, 7, 32, generator=g)
    y = torch.randint(0, 4, (4,), generator=g)
    if rank == 1 and step == 5:
        x[2] *= 300
    with torch.autocast("cpu", dtype=torch.float16):
        logits = net(x)
    loss = F.cross_entropy(logits.float(), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
