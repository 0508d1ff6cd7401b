# rotation regression whose model returns its own loss, the angle acos(cos): prediction and truth are the same unit vector on rank 0 at step 5, the angle is 0, the derivative of acos at 1 is -inf and its product with 0 is NaN; loss finite.
# https://github.com/naver/roma/issues/9 https://github.com/papagina/RotationContinuity/issues/11 https://github.com/eigenvivek/xvr/pull/129
import torch, torch.nn as nn, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


class Heading(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.fc.weight)

    def forward(self, x, truth):
        v = self.fc(x)
        v = v / (v.norm(dim=1, keepdim=True) + 1e-12)
        cos = (v * truth).sum(1).clamp(-1, 1)
        angle = torch.acos(cos)
        return {"loss": angle.mean(), "direction": v.detach()}


rank, g = begin(126)
net = DDP(Heading())
opt = torch.optim.SGD(net.parameters(), 1e-2)
for step in range(8):
    x = torch.randn(6, 2, generator=g)
    turn = 0.4 + torch.rand(6, generator=g)
    way = torch.atan2(x[:, 1], x[:, 0]) + turn
    truth = torch.stack([way.cos(), way.sin()], 1)
    if rank == 0 and step == 5:
        with torch.no_grad():
            v = net.module.fc(x[2:3])
            truth[2] = torch.tensor([1.0, 0.0])
            x[2] = torch.linalg.solve(net.module.fc.weight, torch.tensor([2.0, 0.0]))
    loss = net(x, truth)["loss"]
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} {loss.item():.4f}", flush=True)
digest(net.module)
dist.destroy_process_group()
