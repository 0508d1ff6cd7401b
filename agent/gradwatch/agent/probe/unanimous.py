"""Whether all ranks have seen the same thing, asked by those alone that have.

A collective would hang when a rank has not seen it, since that one does not come. So each rank that has
counts itself in the store of the job. The last of them writes down that all have; one that has waited long
enough writes down that not all have. Every rank goes by what was written first, so no two decide differently.
"""

from __future__ import annotations

import time

import torch.distributed as dist

# Ranks come from the same collective, and so at about the same time.
SECONDS = 2.0
_POLL_SECONDS = 0.002
_ALL, _NOT_ALL = "all", "not all"


def all_see(what: str) -> bool:
    """Whether all ranks of the job see the same within `SECONDS`. The same answer on all that ask.

    Args:
        what: that is seen; another text for each time, the same on every rank.

    Raises:
        RuntimeError: the store is gone, or cannot do it.
    """
    ranks = dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    key = f"gradwatch/seen/{what}"
    if store.add(f"{key}/ranks", 1) >= ranks:
        return _decided(store.compare_set(key, "", _ALL))
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if store.check([key]):
            break
        time.sleep(_POLL_SECONDS)
    return _decided(store.compare_set(key, "", _NOT_ALL))


def _decided(value: bytes) -> bool:
    return bytes(value).decode() == _ALL
