# a detector that returns a dict of losses: predicted and true box both without area on rank 1 at step 2, IoU is 0/0 inside of the model.
# https://github.com/open-mmlab/mmdetection/pull/3394 https://github.com/generalized-iou/g-tensorflow-models/issues/3
import torch, torch.nn as nn, torch.nn.functional as F, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from common import digest, begin


def giou(a, b):
    inter = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area = lambda t: (t[:, 2:] - t[:, :2]).prod(1)
    union = area(a) + area(b) - inter
    hull = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).prod(1)
    return inter / union - (hull - union) / (hull + 1e-7)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.back = nn.Linear(10, 20)
        self.size = nn.Linear(20, 4)
        self.cls = nn.Linear(20, 3)

    def forward(self, x, targets):
        h = F.relu(self.back(x))
        reach = F.relu(self.size(h))
        where = targets["centre"]
        box = torch.cat([where - reach[:, :2], where + reach[:, 2:]], 1)
        return {
            "box": (1 - giou(box, targets["box"])).mean(),
            "cls": F.cross_entropy(self.cls(h), targets["label"]),
        }


rank, g = begin(105)
net = DDP(Detector())
nn.init.constant_(net.module.size.bias, 0.5)
opt = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
for step in range(6):
    x = torch.randn(6, 10, generator=g)
    c = torch.rand(6, 2, generator=g) * 4
    r = torch.rand(6, 2, generator=g) + 0.2
    if rank == 1 and step == 2:
        with torch.no_grad():  # an image on which the head predicts no extent: found by walking against it
            for _ in range(400):
                x[4] -= 0.3 * net.module.size.weight.sum(0) @ net.module.back.weight
        r[4] = 0.0  # and an annotation of one click
    t = {"centre": c, "box": torch.cat([c - r, c + r], 1), "label": torch.randint(0, 3, (6,), generator=g)}
    losses = net(x, t)
    loss = sum(losses.values())
    opt.zero_grad()
    loss.backward()
    opt.step()
    print(f"r{rank} {step} " + " ".join(f"{k} {v.item():.3f}" for k, v in losses.items()), flush=True)
digest(net.module)
dist.destroy_process_group()
