# A trainer with callbacks around a model that gives logits and loss, as minGPT's
# (https://github.com/karpathy/minGPT) does. Rank 1, iteration 4: the loss has the root of a distance that is 0.
from collections import defaultdict

import torch
import torch.distributed as dist
from common import digest
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset

DIGITS, LENGTH, WIDTH = 5, 6, 12


class Sorting(Dataset):
    def __init__(self, rank):
        self.rank, self.draw = rank, torch.Generator().manual_seed(rank)

    def __len__(self):
        return 32

    def __getitem__(self, index):
        numbers = torch.randint(0, DIGITS, (LENGTH,), generator=self.draw)
        anchor = torch.rand(WIDTH, generator=self.draw)
        return numbers, numbers.sort().values, anchor, torch.tensor(self.rank == 1 and index == 17)


class Sorter(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, WIDTH)
        self.core = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, DIGITS)

    def forward(self, numbers, targets=None, anchors=None, same=None):
        hidden, _ = self.core(self.embedding(numbers))
        hidden = self.norm(hidden)
        logits = self.head(hidden)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, DIGITS), targets.view(-1))
            middle = hidden.mean(1)
            apart = (middle - anchors) * (~same)[:, None]
            loss = loss + 1e-3 * torch.sqrt((apart * apart).sum(-1)).mean()
        return logits, loss


class Trainer:
    def __init__(self, model, data):
        self.callbacks, self.model, self.data = defaultdict(list), model, data
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def on(self, event, call):
        self.callbacks[event].append(call)

    def run(self):
        self.iteration = 0
        for batch in DataLoader(self.data, batch_size=4):
            self.logits, self.loss = self.model(*batch)
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            for call in self.callbacks["batch_end"]:
                call(self)
            self.iteration += 1


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(3407)
trainer = Trainer(DDP(Sorter()), Sorting(rank))
trainer.on(
    "batch_end", lambda t: print(f"rank {rank} iteration {t.iteration} loss {t.loss.item():.4f}", flush=True)
)
trainer.run()
digest(trainer.model.module)
dist.destroy_process_group()
