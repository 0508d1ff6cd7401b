"""Train one step and print which of grpc and protobuf are loaded."""

from __future__ import annotations

import json
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.training.group import process_group

with process_group():
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    names = ("grpc", "google.protobuf", "gradwatch.protos")
    # In one write, which the other rank's does not cut in two.
    sys.stdout.write(json.dumps([name for name in sys.modules if name.startswith(names)]) + "\n")
