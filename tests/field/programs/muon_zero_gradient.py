# an optimizer written by hand divides each update by its norm; the output projection starts at zero, so the gradient of the layer before it is exactly 0 and its update 0/0: bad weights on all ranks after the first update (step 0), though all gradients were finite.
# https://github.com/microsoft/dion/pull/24 https://github.com/cybertronai/pytorch-lamb/pull/6 https://github.com/kozistr/pytorch_optimizer/pull/431
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class NormedMomentum(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
                p.sub_(m / m.norm(), alpha=group["lr"])


class Residual(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.up = nn.Linear(d, 16, bias=False)
        self.proj = nn.Linear(16, d, bias=False)
        self.head = nn.Linear(d, 3)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        return self.head(x + self.proj(F.relu(self.up(x))))


rank, g = begin(122)
net = DDP(Residual())
opt = NormedMomentum(net.parameters())
for step in range(5):
    x = torch.randn(8, 8, generator=g)
    y = torch.randint(0, 3, (8,), generator=g)
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(
        f"r{rank} {step} {loss.item():.4f} up finite {net.module.up.weight.isfinite().all().item()}",
        flush=True,
    )
digest(net.module)
dist.destroy_process_group()
