# SAC's squashed Gaussian without an epsilon: on rank 1 at step 4 tanh saturates to exactly 1 and log(1 - a^2) is log(0), inside of the policy's forward. The job dies at step 5, when Normal refuses its NaN.
# https://github.com/cpnota/autonomous-learning-library/issues/139 https://github.com/philtabor/Actor-Critic-Methods-Paper-To-Code/issues/7 https://github.com/pytorch/rl/issues/2199
import torch, torch.nn as nn, torch.distributed as dist
from torch.distributions import Normal
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Squashed(nn.Module):
    def __init__(self, obs=5, act=2):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs, 24), nn.ReLU())
        self.mu, self.log_std = nn.Linear(24, act), nn.Linear(24, act)

    def forward(self, obs):
        h = self.trunk(obs)
        gauss = Normal(self.mu(h), self.log_std(h).clamp(-5, 2).exp())
        raw = gauss.rsample()
        action = torch.tanh(raw)
        logp = gauss.log_prob(raw) - torch.log(1 - action**2)
        return action, logp.sum(-1)


rank, g = begin(101)
policy = DDP(Squashed())
critic = nn.Linear(7, 1).requires_grad_(False)
opt = torch.optim.Adam(policy.parameters(), 3e-4)
for step in range(8):
    torch.manual_seed(7 * step + rank)
    obs = torch.randn(16, 5, generator=g)
    if rank == 1 and step == 4:
        obs[3] = obs[3] * 400  # a sensor was not normalised
    action, logp = policy(obs)
    q = critic(torch.cat([obs, action], 1)).squeeze(1)
    loss = (0.2 * logp - q).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(policy.module)
dist.destroy_process_group()
