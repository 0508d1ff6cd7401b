"""What watching costs, as ratios within one process group.

usage: torchrun --nproc-per-node 2 -m benchmarks.overhead [STEPS]

Two copies of the reference transformer train in turn, one step each: one wrapped before the probe
was active, so that torch reduces it as ever, one wrapped after. In the watched one's steps the look
at each bucket takes turns with one `torch.sum` over the same buffer at the same moment.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.reference import ReferenceTransformer, random_batch

SCAN_LIMIT = {torch.float32: 1.3, torch.bfloat16: 1.5}
SHARE_LIMIT = 0.01


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
    for dtype in (torch.float32, torch.bfloat16):
        measure(rank, dtype, steps)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def build(dtype: torch.dtype) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = DistributedDataParallel(ReferenceTransformer().to(dtype))
    return model, torch.optim.SGD(model.parameters(), lr=1e-4)


def one_step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one training step."""
    batch = random_batch()
    dist.barrier()
    began = time.perf_counter()
    optimizer.zero_grad()
    model(batch).backward()
    optimizer.step()
    return time.perf_counter() - began


def unwatched(dtype: torch.dtype) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    """A model that the probe does not see, although it may be active already."""
    from gradwatch.agent.probe.activate import active

    probe = active()
    if probe is None:
        return build(dtype)
    probe.watcher.fuses.counts["attach"] = 1
    try:
        return build(dtype)
    finally:
        del probe.watcher.fuses.counts["attach"]


def measure(rank: int, dtype: torch.dtype, steps: int) -> None:
    plain, plain_optimizer = unwatched(dtype)
    os.environ.setdefault("GRADWATCH_SPOOL", tempfile.mkdtemp(prefix="gradwatch-bench-"))
    from gradwatch.agent.probe.activate import activate

    probe = activate()
    assert probe is not None
    watched, watched_optimizer = build(dtype)
    model = probe.ddp.model_of(watched)
    assert model is not None
    assert probe.ddp.model_of(plain) is None

    look = model.look.local
    times: dict[str, list[float]] = {"scan": [], "sum": []}
    turn = {"kind": "scan", "spent": 0.0}

    def timed(moment: Any, bucket: Any, *, brief: bool) -> Any:
        began = time.perf_counter()
        if turn["kind"] == "sum":
            torch.sum(bucket.buffer)
            turn["spent"] += time.perf_counter() - began
            return None
        found = look(moment, bucket, brief=brief)
        turn["spent"] += time.perf_counter() - began
        return found

    model.look.local = timed  # type: ignore[method-assign]
    for _ in range(3):
        one_step(plain, plain_optimizer)
        one_step(watched, watched_optimizer)

    arrival = timeit.timeit(lambda: probe.watcher.arrivals.order.append(1), number=100_000) / 100_000
    arrival *= 2 * len(list(watched.parameters()))
    ratios, shares = [], []
    for number in range(2 * steps):
        without = one_step(plain, plain_optimizer)
        turn.update(kind="scan" if number % 2 else "sum", spent=0.0)
        before = probe.watcher.probe_seconds
        with_us = one_step(watched, watched_optimizer)
        times[turn["kind"]].append(turn["spent"])
        if turn["kind"] == "scan":
            ratios.append(with_us / without)
            shares.append((probe.watcher.probe_seconds - before + arrival) / with_us)
        if rank == 0 and (number + 1) % 20 == 0:
            print(f"  {dtype}: {number + 1} of {2 * steps} pairs of steps", file=sys.stderr, flush=True)
    if rank == 0:
        scan = statistics.median(times["scan"])
        one_pass = statistics.median(times["sum"])
        size = sum(parameter.numel() * parameter.element_size() for parameter in watched.parameters())
        share = statistics.median(shares)
        print(f"{dtype}, {size / 1e6:.0f} MB of gradients")
        print(
            f"  scan / one torch.sum pass         {scan / one_pass:.2f}  (limit {SCAN_LIMIT[dtype]})"
            f"   {scan * 1e3:.2f} ms / {one_pass * 1e3:.2f} ms"
        )
        print(
            f"  probe's own share of the step     {share:.2%}  (limit {SHARE_LIMIT:.0%})   {spread(shares)}"
        )
        print(f"  step time, watched / unwatched    {spread(ratios)}   (median [quartiles])", flush=True)
    spool = Path(os.environ["GRADWATCH_SPOOL"])
    assert not any('"nonfinite"' in journal.read_text() for journal in spool.glob("*.jsonl"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
