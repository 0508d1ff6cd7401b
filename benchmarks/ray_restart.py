"""What a rollback adds to Ray Train's own restart of its workers, side by side on one cluster.

usage: python -m benchmarks.ray_restart [--times 5]

Ray's own: from the crash of the train function to the start of the next. Ours: from the decision to the start
of the next. Both hold Ray's poll, every 2 s.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.ray_jobs import ray_cluster, starts_of, train
from tests.recovery import write_policy

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT_SECONDS = 2.0
# Steps between two faults: two checkpoints.
APART = 10


def starts(address: str, folder: Path, *script: object, launcher: Sequence[object] = ()) -> list[float]:
    """Run the training; when its train function started."""
    done = train(address, folder / "storage", "--sleep", 0.1, *script, launcher=launcher)
    if done.returncode != 0:
        raise SystemExit(done.stdout)
    return [at for _, at in starts_of(folder / "storage")]


def rays_own(address: str, folder: Path, steps: list[int]) -> list[float]:
    """Seconds from each crash to the next start."""
    script = ["--steps", steps[-1] + APART, "--max-failures", len(steps), "--crash-at", *steps]
    began = starts(address, folder, *script)
    crashes = [float((folder / "storage" / f"crashed-{step}").read_text()) for step in steps]
    return [start - crash for start, crash in zip(began[1:], crashes, strict=True)]


def ours(address: str, folder: Path, steps: list[int]) -> list[float]:
    """Seconds from each decision to the next start."""
    folder.mkdir()
    budgets = {"job": len(steps), "same_first_bad_step": 1, "no_progress": 3}
    policy = write_policy(folder / "policy.yaml", folder / "storage" / "run", budgets=budgets)
    report = folder / "report.json"
    launcher = [sys.executable, "-m", "gradwatch.cli", "run", "--state-dir", folder / "state"]
    launcher += ["--policy", policy, "--report", report, "--"]
    script = ["--steps", steps[-1] + 6 * APART, "--max-failures", len(steps), "--strike", *steps]
    began = starts(address, folder, *script, launcher=launcher)
    decisions = [one for one in json.loads(report.read_text())["decisions"] if one["outcome"] == "performed"]
    decided = sorted(dt.datetime.fromisoformat(one["at"]).timestamp() for one in decisions)
    return [start - at for start, at in zip(began[1:], decided, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    steps = [12 + APART * number for number in range(parser.parse_args().times)]
    with tempfile.TemporaryDirectory(prefix="gradwatch-bench-") as name, ray_cluster() as cluster:
        own = rays_own(cluster.address, Path(name) / "own", steps)
        mine = ours(cluster.address, Path(name) / "ours", steps)
    added = statistics.median(mine) - statistics.median(own)
    verdict = "ok" if added <= LIMIT_SECONDS else "TOO SLOW"
    print(
        f"rollback under Ray Train: {added:+.2f} s over Ray's own restart of "
        f"{statistics.median(own):.2f} s (medians of {len(own)}; limit {LIMIT_SECONDS:g} s): {verdict}"
    )


if __name__ == "__main__":
    main()
