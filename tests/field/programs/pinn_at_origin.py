# physics-informed network: u = r * net(x) with r = |x|; a collocation point in the origin on rank 0 at step 3. u is finite, u_x by autograd.grad (create_graph) is NaN, so the loss is.
# https://github.com/lululxvi/deepxde/issues/428 https://github.com/prateekbhustali/Physics-Informed-Neural-Networks/issues/1
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, xy):
        r = torch.sqrt((xy**2).sum(1, keepdim=True))
        return r * self.net(xy)


def slope(of, by):
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]


rank, g = begin(118)
u_net = DDP(Field())
opt = torch.optim.Adam(u_net.parameters(), 1e-3)
for step in range(7):
    xy = torch.rand(20, 2, generator=g) * 2 - 1
    if rank == 0 and step == 3:
        xy[11] = 0.0
    xy.requires_grad_(True)
    u = u_net(xy)
    du = slope(u, xy)
    laplace = slope(du[:, 0], xy)[:, 0] + slope(du[:, 1], xy)[:, 1]
    loss = (laplace + 1.0).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f} u finite {u.isfinite().all().item()}", flush=True)
digest(u_net.module)
dist.destroy_process_group()
