# one process, an RNN with ReLU over a long sequence, no clipping: the recurrent weight grows and the activations overflow; no sample and no single operator is to blame.
# https://github.com/keras-team/keras/issues/2194 https://github.com/chenxie95/deeplearning_course_sjtu/issues/31
import torch, torch.nn as nn, torch.nn.functional as F
from common import digest

torch.manual_seed(114)
g = torch.Generator().manual_seed(114)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 24, nonlinearity="relu", batch_first=True)
        self.out = nn.Linear(24, 1)
        nn.init.eye_(self.rnn.weight_hh_l0)  # IRNN

    def forward(self, x):
        h, _ = self.rnn(x)
        return self.out(h[:, -1]).squeeze(1)


net = Net()
opt = torch.optim.SGD(net.parameters(), 2e-4)
for step in range(10):
    x = torch.randn(8, 60, 3, generator=g)
    loss = F.mse_loss(net(x), x[:, :, 0].sum(1))
    opt.zero_grad()
    loss.backward()
    norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
    opt.step()
    print(f"{step} {loss.item():.4g} |g| {norm.item():.3g}", flush=True)
digest(net)
