"""What the programs share: how they begin, and a digest of the weights, by which two runs are compared."""

import hashlib
import os

import torch
import torch.distributed as dist


def begin(seed):
    """This rank, and what it draws its batches with."""
    dist.init_process_group("gloo")
    torch.manual_seed(seed)
    return dist.get_rank(), torch.Generator().manual_seed(1000 * seed + dist.get_rank())


def digest(*modules):
    """Print a hash of all weights and buffers of some modules."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            if isinstance(value, torch.Tensor):
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                flat = whole.detach().cpu().contiguous().reshape(-1)
                found.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    print(f"HASH rank {os.environ.get('RANK', '0')} {found.hexdigest()[:16]}", flush=True)
