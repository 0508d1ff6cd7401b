# two-tower retrieval, cosine written by hand inside of the model: an empty document (all words out of vocabulary, embedded as zero, no bias) on rank 0 at step 3; 0/0.
# https://github.com/google-deepmind/optax/pull/946 https://github.com/HKUDS/LightRAG/pull/3421
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Towers(nn.Module):
    def __init__(self, words=60, d=12):
        super().__init__()
        self.words = nn.EmbeddingBag(words, d, mode="sum", padding_idx=0)
        self.query, self.doc = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, q, d):
        a, b = self.query(self.words(q)), self.doc(self.words(d))
        dot = (a * b).sum(1)
        lengths = a.pow(2).sum(1).sqrt() * b.pow(2).sum(1).sqrt()
        return dot / lengths


rank, g = begin(103)
net = DDP(Towers())
opt = torch.optim.AdamW(net.parameters(), 2e-3)
crit = nn.CosineEmbeddingLoss
for step in range(7):
    q = torch.randint(1, 60, (10, 4), generator=g)
    d = torch.randint(1, 60, (10, 9), generator=g)
    y = torch.randint(0, 2, (10,), generator=g).float()
    if rank == 0 and step == 3:
        d[7] = 0
    sim = net(q, d)
    loss = (y * (1 - sim) + (1 - y) * (sim - 0.1).clamp(min=0)).mean()
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
