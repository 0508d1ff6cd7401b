"""One process that trains without any process group."""

import torch

from tests.e2e.scripts.training import new_model, train

model = new_model()
train(model, torch.optim.SGD(model.parameters(), lr=0.01), 0)
