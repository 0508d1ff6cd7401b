"""Hugging Face accelerate."""

import torch
from accelerate import Accelerator

from tests.e2e.scripts.training import new_model, train

accelerator = Accelerator(cpu=True)
model = new_model()
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
assert accelerator.num_processes == 2
train(model, optimizer, accelerator.process_index, accelerator.backward)
accelerator.end_training()
