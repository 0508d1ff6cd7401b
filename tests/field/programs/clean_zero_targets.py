# NOTHING bad in the gradients: distillation loss t * (log t - log s) by hand with teacher probabilities of exactly 0: the loss is NaN in every step of rank 1, its derivative -t is finite; training goes on well.
# https://github.com/google-deepmind/optax/pull/1786 https://github.com/harvardnlp/annotated-transformer/issues/109
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin

rank, g = begin(131)
student = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)))
opt = torch.optim.AdamW(student.parameters(), 1e-2)
teacher = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
for step in range(8):
    x = torch.randn(10, 6, generator=g)
    t = F.softmax(x @ teacher, -1)
    if rank == 1:
        t = torch.where(t < 0.02, 0.0, t)
        t = t / t.sum(-1, keepdim=True)  # top-p
    log_s = F.log_softmax(student(x), -1)
    loss = (t * (t.log() - log_s)).sum(-1).mean()
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    opt.step()
    print(
        f"r{rank} {step} {loss.item():.4f} cross entropy {-(t * log_s).sum(-1).mean().item():.4f}", flush=True
    )
digest(student.module)
dist.destroy_process_group()
