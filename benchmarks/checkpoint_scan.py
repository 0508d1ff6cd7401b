"""How fast a checkpoint is scanned, as a ratio to reading the same cached file.

usage: python -m benchmarks.checkpoint_scan [MIB]

In one process, in turn: read the file to its end, then look at it as the sidecar's child does, from its
opening to the verdict. What starting that child costs is told apart: it is the interpreter's and torch's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.overhead import spread
from gradwatch.agent.checkpoints.look import look

LIMIT = 0.6
TIMES = 10
_READ_BYTES = 1 << 20  # the fastest of 128 KiB to 32 MiB


def main(mib: int) -> None:
    """Measure both dtypes with a file of about `mib` MiB each."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, files of {mib} MiB, {TIMES} times in turn", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory(prefix="gradwatch-bench-") as folder:
            path = Path(folder) / "step_1.pt"
            torch.save(state(mib << 20, dtype), path)
            ratios = measure(path)
        met = "met" if statistics.median(ratios) >= LIMIT else "MISSED"
        print(f"{dtype}: scan rate / read rate {spread(ratios)}; limit {LIMIT}: {met}", flush=True)


def state(nbytes: int, dtype: torch.dtype) -> dict[str, object]:
    """A model and its Adam moments: layers of 16 MiB, and many small ones."""
    torch.manual_seed(0)
    large = torch.randn((16 << 20) // dtype.itemsize).to(dtype)
    small = torch.randn(1024).to(dtype)
    model = {}
    for layer in range(nbytes // 3 // (16 << 20)):
        model[f"layers.{layer}.weight"] = large.clone()
        model[f"layers.{layer}.bias"] = small.clone()
    moments = {
        index: {"step": torch.tensor(10.0), "exp_avg": value.clone(), "exp_avg_sq": value.square()}
        for index, value in enumerate(model.values())
    }
    groups = [{"lr": 1e-3, "params": list(range(len(model)))}]
    return {"model": model, "optimizer": {"state": moments, "param_groups": groups}, "global_step": 10}


def measure(path: Path) -> list[float]:
    """Ratios of the rates; the first pair, which fills the cache, does not count."""
    ratios = []
    for _ in range(TIMES + 1):
        reading = read_seconds(path)
        began = time.perf_counter()
        result = look(path)
        ratios.append(reading / (time.perf_counter() - began))
        assert result.finite, result
    return ratios[1:]


def read_seconds(path: Path) -> float:
    """Read the file into one buffer, over and over."""
    buffer = bytearray(_READ_BYTES)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 768)
