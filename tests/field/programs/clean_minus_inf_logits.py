# NOTHING bad in the gradients: invalid actions masked with -inf inside of the model, so outputs hold -inf in every step; label smoothing makes the loss inf, its derivative is finite; the policy learns.
# https://github.com/facebookresearch/pytext/pull/1698 https://github.com/google-deepmind/optax/issues/896 https://github.com/hill-a/stable-baselines/pull/505
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, s, legal):
        return self.net(s).masked_fill(~legal, float("-inf"))


rank, g = begin(135)
net = DDP(Masked())
opt = torch.optim.Adam(net.parameters(), 1e-2)
for step in range(9):
    s = torch.randn(8, 5, generator=g)
    legal = torch.rand(8, 6, generator=g) > 0.4
    a = s.argmax(1)
    legal[torch.arange(8), a] = True
    logits = net(s, legal)
    loss = F.cross_entropy(logits, a, label_smoothing=0.1 if step > 3 else 0.0)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(
        f"r{rank} {step} {loss.item():.4f} hit {(logits.argmax(1) == a).float().mean().item():.2f} weights ok {all(p.isfinite().all().item() for p in net.parameters())}",
        flush=True,
    )
digest(net.module)
dist.destroy_process_group()
