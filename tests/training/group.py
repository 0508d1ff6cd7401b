"""Begin and end a gloo process group."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def process_group() -> Iterator[int]:
    """A gloo group over the ranks of the environment; gives this rank.

    Leaves without running static destructors: torch 2.13 on the CPU now and then aborts in
    them after gloo ("terminate called without an active exception"), watched or not.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield dist.get_rank()
    leave()


def leave() -> None:
    """End the group and this process, as `process_group` does."""
    dist.barrier()
    dist.destroy_process_group()
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
