# sum of token losses divided by the number of valid tokens of the whole accumulation window, outside of the model: rank 0's window at step 4 (its last, uneven) holds prompts only; 0/0 in each of its 3 micro-batches.
# https://github.com/karpathy/nanochat/pull/400 https://github.com/PrimeIntellect-ai/prime-rl/pull/1961 https://github.com/huggingface/blog/pull/2414
import contextlib, torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin

V, ACC = 30, 3


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Embedding(V, 12)
        self.n = nn.LayerNorm(12)
        self.b = nn.Linear(12, V)

    def forward(self, t):
        return self.b(self.n(self.a(t)))


rank, g = begin(111)
net = DDP(Bigram())
opt = torch.optim.AdamW(net.parameters(), 1e-3)
for step in range(6):
    window = []
    for _ in range(ACC):
        t = torch.randint(0, V, (2, 10), generator=g)
        labels = t.clone()
        labels[:, :5] = -100
        if rank == 0 and step == 4:
            labels[:] = -100
        window.append((t, labels))
    valid = sum((l[:, 1:] != -100).sum() for _, l in window)
    for i, (t, labels) in enumerate(window):
        with contextlib.nullcontext() if i == ACC - 1 else net.no_sync():
            goal = labels[:, 1:].reshape(-1)
            keep = (goal != -100).float()
            each = F.cross_entropy(net(t)[:, :-1].reshape(-1, V), goal.clamp(min=0), reduction="none")
            loss = (each * keep).sum() / valid
            loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
