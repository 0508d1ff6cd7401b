# NOTHING bad in training: a correlation for the log is NaN (constant targets on rank 0, std 0), and the model also returns a perplexity that is inf; neither reaches the loss.
# https://github.com/bernardo-de-almeida/DeepSTARR/issues/3 https://github.com/loyalzc/nlp_kesci/issues/2
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(7, 14)
        self.b = nn.Linear(14, 1)

    def forward(self, x):
        s = self.b(F.relu(self.a(x))).squeeze(1)
        with torch.no_grad():
            perplexity = torch.exp(s.abs().sum() * 1e3)
        return {"score": s, "perplexity": perplexity, "spread": (s - s).std() / (s - s).std()}


rank, g = begin(132)
net = DDP(Scorer())
opt = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(8):
    x = torch.randn(9, 7, generator=g)
    y = x[:, 0] if rank else torch.full((9,), 0.5)
    out = net(x)
    loss = F.smooth_l1_loss(out["score"], y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    with torch.no_grad():
        a, b = out["score"] - out["score"].mean(), y - y.mean()
        r = (a * b).mean() / (a.std() * b.std())
    print(
        f"r{rank} {step} {loss.item():.4f} r {r.item():.3f} perplexity {out['perplexity'].item():.3g} {out['spread'].item()}",
        flush=True,
    )
digest(net.module)
dist.destroy_process_group()
