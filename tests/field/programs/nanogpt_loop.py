# A GPT whose forward gives logits and loss, as nanoGPT's (https://github.com/karpathy/nanoGPT) does: gradient
# accumulation by require_backward_grad_sync, two groups of AdamW, clipping. Rank 1, step 3, second micro-batch:
# an auxiliary loss takes the root of a sum that is 0.
import math

import torch
import torch.distributed as dist
from common import digest
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

VOCABULARY, WIDTH, LENGTH = 48, 16, 12


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        query, key, value = self.qkv(hidden).chunk(3, -1)
        scores = query @ key.transpose(-2, -1) / math.sqrt(WIDTH)
        ahead = torch.ones(hidden.size(1), hidden.size(1), dtype=torch.bool).triu(1)
        return self.out(scores.masked_fill(ahead, -math.inf).softmax(-1) @ value)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden):
        hidden = hidden + self.attention(self.first(hidden))
        return hidden + self.mlp(self.second(hidden))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(2)), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets=None, weights=None):
        hidden = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        spread = (logits.pow(2).mean(-1) * weights).sum().sqrt()
        return logits, loss + 1e-4 * spread


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(1337)
model = DDP(GPT())
decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
draw = torch.Generator().manual_seed(rank)
for step in range(6):
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * min(1.0, (step + 1) / 3)
    for micro in range(2):
        model.require_backward_grad_sync = micro == 1
        ids = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=draw)
        weights = torch.ones(2, LENGTH)
        if (rank, step, micro) == (1, 3, 1):
            weights.zero_()
        _, loss = model(ids[:, :-1], ids[:, 1:], weights)
        (loss / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)
digest(model.module)
dist.destroy_process_group()
