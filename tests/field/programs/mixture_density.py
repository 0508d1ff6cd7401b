# mixture density network under FSDP2, negative log likelihood written without logsumexp outside of the model: a target far from all components on rank 0 at step 3, densities underflow, -log(0) is inf.
# https://github.com/keras-team/keras/issues/1061 https://github.com/mlberkeley/scae-pytorch/pull/4
import math, torch, torch.nn as nn, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from common import digest, begin


class Mixture(nn.Module):
    def __init__(self, k=4):
        super().__init__()
        self.body = nn.Linear(2, 24)
        self.heads = nn.Linear(24, 3 * k)

    def forward(self, x):
        weight, mean, spread = self.heads(torch.tanh(self.body(x))).chunk(3, -1)
        return weight.softmax(-1), mean, spread.exp()


def nll(weight, mean, sigma, y):
    density = torch.exp(-0.5 * ((y - mean) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return -torch.log((weight * density).sum(-1)).mean()


rank, g = begin(116)
net = Mixture()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for part in (net.body, net.heads):
    fully_shard(part, mesh=mesh)
fully_shard(net, mesh=mesh)
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(6):
    x = torch.randn(16, 2, generator=g)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=g)
    if rank == 0 and step == 3:
        y[9] = 90.0
    loss = nll(*net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net)
dist.destroy_process_group()
