# accelerate; GraphSAGE-like mean over neighbours divides by the degree: a node without neighbours in rank 1's graph at step 3 (0/0 in the first layer).
# https://github.com/MrLeeeee/GCN-GAT-and-Graphsage/issues/3 https://github.com/biomed-AI/Hist2ST/pull/7
import torch, torch.nn as nn, torch.nn.functional as F
from accelerate import Accelerator
from common import digest


class MeanLayer(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.own, self.near = nn.Linear(i, o), nn.Linear(i, o)

    def forward(self, h, adj):
        return F.relu(self.own(h) + self.near(adj @ h / adj.sum(1, keepdim=True)))


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.read = MeanLayer(4, 12), MeanLayer(12, 12), nn.Linear(12, 2)

    def forward(self, h, adj):
        return self.read(self.two(self.one(h, adj), adj).mean(0, keepdim=True))


acc = Accelerator(cpu=True)
torch.manual_seed(113)
net = Graph()
opt = torch.optim.Adam(net.parameters(), 1e-3)
net, opt = acc.prepare(net, opt)
g = torch.Generator().manual_seed(1130 + acc.process_index)
for step in range(7):
    n = 9
    adj = (torch.rand(n, n, generator=g) < 0.4).float()
    adj = ((adj + adj.t() + torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)) > 0).float()
    adj.fill_diagonal_(0)
    if acc.process_index == 1 and step == 3:
        adj[6] = 0
        adj[:, 6] = 0
    loss = F.cross_entropy(net(torch.randn(n, 4, generator=g), adj), torch.randint(0, 2, (1,), generator=g))
    opt.zero_grad()
    acc.backward(loss)
    acc.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    print(f"r{acc.process_index} {step} {loss.item():.4f}", flush=True)
digest(acc.unwrap_model(net))
acc.end_training()
