# EMA weights are swapped in to go on from them; the average was reset at step 5 and its bias correction divides by 1 - 0.9**0: all weights of all ranks become NaN outside of any optimizer, before step 5's forward pass.
# https://github.com/PaddlePaddle/Paddle/pull/17677 https://github.com/kozistr/pytorch_optimizer/pull/525 https://github.com/keras-team/keras/pull/18978
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Average:
    def __init__(self, model, decay=0.9):
        self.model, self.decay = model, decay
        self.reset()

    def reset(self):
        self.n = 0
        self.sum = [torch.zeros_like(p) for p in self.model.parameters()]

    @torch.no_grad()
    def update(self):
        self.n += 1
        for s, p in zip(self.sum, self.model.parameters()):
            s.mul_(self.decay).add_(p, alpha=1 - self.decay)

    @torch.no_grad()
    def swap_in(self):
        for s, p in zip(self.sum, self.model.parameters()):
            p.copy_(s / (1 - self.decay**self.n))


class Tied(nn.Module):
    def __init__(self, v=20, d=8):
        super().__init__()
        self.emb = nn.Embedding(v, d)
        self.mid = nn.Linear(d, d)
        self.out = nn.Linear(d, v, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, t):
        return self.out(torch.tanh(self.mid(self.emb(t))))


rank, g = begin(109)
net = DDP(Tied())
ema = Average(net.module)
opt = torch.optim.SGD(net.parameters(), 0.1)
for step in range(8):
    if step == 3:
        ema.swap_in()  # fine
    if step == 5:
        ema.reset()
        ema.swap_in()  # in the wrong order
    t = torch.randint(0, 20, (6, 9), generator=g)
    loss = F.cross_entropy(net(t[:, :-1]).reshape(-1, 20), t[:, 1:].reshape(-1))
    opt.zero_grad()
    loss.backward()
    opt.step()
    ema.update()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
