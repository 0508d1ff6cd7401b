# linear-chain CRF, forward algorithm in log space in the model: a state that no path reaches (all of its scores -inf) on rank 1 at step 4; the hand-written log-sum-exp subtracts the maximum, -inf - -inf: NaN in the forward pass. Other, harmless -inf are there in every step.
# https://github.com/pytorch/pytorch/issues/31829 https://github.com/pytorch/pytorch/issues/49724
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


def lse(x):
    top = x.max(1, keepdim=True).values
    return top.squeeze(1) + (x - top).exp().sum(1).log()


class Chain(nn.Module):
    def __init__(self, d=5, k=4):
        super().__init__()
        self.emit = nn.Linear(d, k)
        self.trans = nn.Parameter(0.1 * torch.randn(k, k))

    def forward(self, x, tags, allowed):
        e = self.emit(x)
        alpha = e[:, 0]
        score = e[:, 0].gather(1, tags[:, :1]).squeeze(1)
        for t in range(1, x.shape[1]):
            step = (alpha[:, :, None] + self.trans).masked_fill(~allowed[:, t], float("-inf"))
            alpha = lse(step) + e[:, t]
            score = (
                score
                + self.trans[tags[:, t - 1], tags[:, t]]
                + e[:, t].gather(1, tags[:, t : t + 1]).squeeze(1)
            )
        return torch.logsumexp(alpha, 1) - score


rank, g = begin(130)
net = DDP(Chain())
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(7):
    x = torch.randn(3, 6, 5, generator=g)
    tags = torch.randint(0, 3, (3, 6), generator=g)
    allowed = torch.ones(3, 6, 4, 4, dtype=torch.bool)
    allowed[:, :, 0, 3] = False
    if rank == 1 and step == 4:
        allowed[1, 3, :, 3] = False  # the gazetteer forbids the last tag there
    nll = net(x, tags, allowed)
    loss = nll.mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
