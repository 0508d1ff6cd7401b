"""What watching costs, as ratios within one process group.

usage: torchrun --nproc-per-node 2 -m benchmarks.overhead [STEPS]

Two copies of a model, of the reference transformer and then of one of many small layers, train in turn, a
step each: one wrapped before the probe was active, so that torch reduces it as ever, one wrapped after. In
the steps of the watched one the looks at each bucket, before its reduction and after it, take turns with one
`torch.sum` over the same buffer at the same moment. A checksum of the parameters, which one round in a
hundred takes, is timed by itself.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import timeit
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reference import ReferenceTransformer, SmallLayers, random_batch, random_rows

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Kind:
    """A model that is measured.

    Attributes:
        batch: gives one rank's batch.
        before_limit: of the look before the reduction over one pass of `torch.sum`, by dtype, as printed.
        after_limit: of the look after it, likewise.
        share_limit: of the probe's own share of the step, as printed.
    """

    name: str
    model: Callable[[], Any]
    batch: Callable[[], torch.Tensor]
    dtypes: tuple[torch.dtype, ...]
    before_limit: dict[torch.dtype, str] = field(default_factory=dict)
    after_limit: dict[torch.dtype, str] = field(default_factory=dict)
    share_limit: str = "none"


LARGE = Kind(
    "reference transformer",
    ReferenceTransformer,
    random_batch,
    (torch.float32, torch.bfloat16),
    {torch.float32: "1.6"},
    {torch.float32: "1.3"},
    "2%",
)
SMALL = Kind("60 small layers", SmallLayers, random_rows, (torch.float32,))


def spread(samples: list[float]) -> str:
    """`1.004 [0.981, 1.030]`: median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main(steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        print(
            f"torch {torch.__version__}, 2 ranks, gloo, 1 thread each, {steps} steps of each kind", flush=True
        )
    for kind in (LARGE, SMALL):
        for dtype in kind.dtypes:
            measure(rank, kind, dtype, steps)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def build(kind: Kind, dtype: torch.dtype) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = DistributedDataParallel(kind.model().to(dtype))
    return model, torch.optim.SGD(model.parameters(), lr=1e-4)


def one_step(kind: Kind, model: Any, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one training step."""
    batch = kind.batch()
    dist.barrier()
    began = time.perf_counter()
    optimizer.zero_grad()
    model(batch).backward()
    optimizer.step()
    return time.perf_counter() - began


def unwatched(kind: Kind, dtype: torch.dtype) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """A model that the probe does not see, although it may be active already."""
    from gradwatch.agent.probe.activate import active

    probe = active()
    if probe is None:
        return build(kind, dtype)
    probe.watcher.fuses.counts["attach"] = 1
    try:
        return build(kind, dtype)
    finally:
        del probe.watcher.fuses.counts["attach"]


class Timed:
    """Both looks of a watched model, each in turn with one `torch.sum` over the same buffers.

    Attributes:
        kind: which of the two is at work, "look" or "sum".
    """

    def __init__(self, model: Any) -> None:
        self.kind = "look"
        self._local, self._reduced = model.look.local, model.look.reduced
        self._spent = {"before": 0.0, "after": 0.0}
        self._times: dict[str, list[float]] = {}
        model.look.local, model.look.reduced = self.before, self.after

    def before(self, moment: Any, bucket: Any, *, brief: bool) -> Any:
        """In place of `Look.local`."""
        began = time.perf_counter()
        if self.kind == "sum":
            torch.sum(bucket.buffer).item()
            found = None
        else:
            found = self._local(moment, bucket, brief=brief)
        self._spent["before"] += time.perf_counter() - began
        return found

    def after(self, moment: Any, buffers: Any) -> Any:
        """In place of `Look.reduced`."""
        began = time.perf_counter()
        if self.kind == "sum":
            found = 0.0 * sum(torch.sum(buffer).item() for buffer in buffers)
        else:
            found = self._reduced(moment, buffers)
        self._spent["after"] += time.perf_counter() - began
        return found

    def end_step(self) -> None:
        """Keep what was spent in a step, by kind and side."""
        for side, seconds in self._spent.items():
            self._times.setdefault(f"{self.kind} {side}", []).append(seconds)
            self._spent[side] = 0.0

    def median(self, kind: str, side: str) -> float:
        """Seconds a step, since `forget`."""
        return statistics.median(self._times[f"{kind} {side}"])

    def forget(self) -> None:
        """What came before was for warming up."""
        self._times.clear()
        self._spent.update(before=0.0, after=0.0)


def measure(rank: int, kind: Kind, dtype: torch.dtype, steps: int) -> None:
    plain, plain_optimizer = unwatched(kind, dtype)
    os.environ.setdefault("GRADWATCH_SPOOL", tempfile.mkdtemp(prefix="gradwatch-bench-"))
    from gradwatch.agent.probe.activate import activate

    probe = activate()
    assert probe is not None
    watched, watched_optimizer = build(kind, dtype)
    model = probe.ddp.model_of(watched)
    assert model is not None
    assert probe.ddp.model_of(plain) is None
    timed = Timed(model)
    for _ in range(3):
        one_step(kind, plain, plain_optimizer)
        one_step(kind, watched, watched_optimizer)
    timed.forget()

    arrival = timeit.timeit(lambda: probe.watcher.arrivals.order.append(1), number=100_000) / 100_000
    arrival *= 2 * len(list(watched.parameters()))
    ratios, shares = [], []
    for number in range(2 * steps):
        without = one_step(kind, plain, plain_optimizer)
        timed.kind = "look" if number % 2 else "sum"
        before = probe.watcher.probe_seconds
        with_us = one_step(kind, watched, watched_optimizer)
        timed.end_step()
        if timed.kind == "look":
            ratios.append(with_us / without)
            shares.append((probe.watcher.probe_seconds - before + arrival) / with_us)
        if rank == 0 and (number + 1) % 20 == 0:
            print(
                f"  {kind.name}, {dtype}: {number + 1} of {2 * steps} pairs of steps",
                file=sys.stderr,
                flush=True,
            )
    if rank == 0:
        report(kind, dtype, model, timed, [shares, ratios])
        print_memory(probe.watcher.probe_memory)
    spool = Path(os.environ["GRADWATCH_SPOOL"])
    assert not any('"nonfinite"' in journal.read_text() for journal in spool.glob("*.jsonl"))


def report(kind: Kind, dtype: torch.dtype, model: Any, timed: Timed, measured: list[list[float]]) -> None:
    from gradwatch.agent.probe.replica import sums_of

    shares, ratios = measured
    parameters = model.parameters()
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    print(f"{kind.name}, {dtype}, {size / 1e6:.0f} MB of gradients")
    for side, limits in (("before", kind.before_limit), ("after", kind.after_limit)):
        looks, sums = (timed.median(kind, side) for kind in ("look", "sum"))
        print(
            f"  look {side:6} / one torch.sum pass  {looks / sums:.2f}  (limit {limits.get(dtype, 'none')})  "
            f"{looks * 1e3:.2f} ms / {sums * 1e3:.2f} ms"
        )
    print(
        f"  probe's own share of the step     {statistics.median(shares):.2%}  (limit {kind.share_limit})   "
        f"{spread(shares)}"
    )
    print(f"  step time, watched / unwatched    {spread(ratios)}   (median [quartiles])")
    checksum = min(timeit.repeat(lambda: sums_of(parameters).tolist(), number=1, repeat=5))
    print(f"  checksum of the parameters        {checksum * 1e3:.2f} ms, one round in 100")


def print_memory(nbytes: int) -> None:
    from gradwatch.agent.probe.autopsy.capsule import CAP_BYTES

    print(
        f"  bytes that the probe keeps        {nbytes:,}, and at most {CAP_BYTES:,} of inputs for a replay",
        flush=True,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
