# VAE whose encoder gives log variances without a bound: an outlier on rank 1 at step 5, exp(logvar / 2) is inf in the reparametrisation, inside of the model.
# https://github.com/vanderschaarlab/synthcity/issues/331 https://github.com/AntixK/PyTorch-VAE/issues/16
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class VAE(nn.Module):
    def __init__(self, n=8, z=3):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(n, 16), nn.LeakyReLU())
        self.mean, self.logvar = nn.Linear(16, z), nn.Linear(16, z)
        self.dec = nn.Linear(z, n)

    def forward(self, x):
        h = self.enc(x)
        mean, logvar = self.mean(h), self.logvar(h)
        std = torch.exp(0.5 * logvar)
        return self.dec(mean + std * torch.randn_like(std)), mean, logvar


rank, g = begin(115)
torch.manual_seed(115)
net = DDP(VAE())
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(8):
    x = torch.randn(10, 8, generator=g)
    if rank == 1 and step == 5:
        x[4] *= 2500
    recon, mean, logvar = net(x)
    loss = F.mse_loss(recon, x) - 0.01 * (1 + logvar - mean.pow(2) - logvar.exp()).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4g} max logvar {logvar.max().item():.1f}", flush=True)
digest(net.module)
dist.destroy_process_group()
