"""One int that all ranks agree on: the smallest of theirs, known one round late.

The reduction runs on gloo's own threads, in a process group of its own, while the training goes on.
What was offered in one round is looked at in the next, by all ranks in the same one.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import torch
import torch.distributed as dist

# A rank that misses a round stalls the others for no longer than this. Shorter than the time after which
# torch gives up on a reduction of gradients, so that the training is not what breaks.
TIMEOUT = dt.timedelta(minutes=5)


class Agreement:
    """All ranks of the job. Making one is a collective, as is each of its calls.

    Raises:
        RuntimeError: there is no process group, or not every rank has come within `TIMEOUT`.
    """

    def __init__(self) -> None:
        # Under a name that does not count: the names of groups that the script makes stay as they are.
        self._group: Any = dist.new_group(
            list(range(dist.get_world_size())),
            timeout=TIMEOUT,
            backend="gloo",
            use_local_synchronization=True,
        )
        self._options = dist.AllreduceOptions()
        self._options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
        self._under_way: tuple[torch.Tensor, Any] | None = None

    def offer(self, value: int) -> None:
        """This rank's value of the round; waits for nobody."""
        self._under_way = self._start(value)

    def agreed(self) -> int | None:
        """The smallest value offered in the round before; None if nothing was offered since.

        Raises:
            RuntimeError: a rank is gone, or has not offered for `TIMEOUT`.
        """
        under_way, self._under_way = self._under_way, None
        return None if under_way is None else _result(*under_way)

    def at_once(self, value: int) -> int:
        """The smallest value of all ranks, waited for.

        Raises:
            RuntimeError: as `agreed`.
        """
        return _result(*self._start(value))

    def _start(self, value: int) -> tuple[torch.Tensor, Any]:
        tensor = torch.tensor([value], dtype=torch.int64, device="cpu")
        return tensor, self._group.allreduce([tensor], self._options)


def _result(tensor: torch.Tensor, work: Any) -> int:
    work.wait()
    return int(tensor.item())
