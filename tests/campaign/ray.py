"""Ray Train runs that are rolled back, at random places: do all end finite, from the right checkpoint?

usage: python -m tests.campaign.ray [--runs 10] [--seed N]

Every second run crashes once more before the next report.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.ray_jobs import POLLS_OFTEN, poisoned, ray_cluster, starts_of, train
from tests.recovery import write_policy


def mistakes(address: str, folder: Path, strike: int, save_every: int, *, crash: bool) -> list[str]:
    """Run one; what went wrong, a sentence each."""
    storage, weights, report = folder / "storage", folder / "weights.pt", folder / "report.json"
    folder.mkdir()
    policy = write_policy(folder / "policy.yaml", storage / "run")
    launcher: list[object] = [sys.executable, "-m", "gradwatch.cli", "run", "--state-dir", folder / "state"]
    launcher += ["--policy", policy, "--report", report, "--"]
    script: list[object] = ["--strike", strike, "--steps", strike + 60, "--sleep", 0.02]
    script += ["--save-every", save_every, "--weights", weights, *(["--crash"] if crash else [])]
    done = train(address, storage, *script, launcher=launcher, **POLLS_OFTEN)
    if done.returncode != 0:
        return [f"exit code {done.returncode}:\n{done.stdout[-3000:]}"]
    # Of a step before the bad one.
    good = (strike - 1) // save_every * save_every
    starts = [step for step, _ in starts_of(storage)]
    expected = [0, good, *([good] if crash else [])]
    wrong = [] if starts == expected else [f"the train function went on from {starts}, not {expected}"]
    if not all(value.isfinite().all() for value in torch.load(weights).values()):
        wrong.append("the weights are not finite")
    marked = {Path(path) for one in json.loads(report.read_text())["decisions"] for path in one["quarantine"]}
    bad = poisoned(storage / "run")
    if not bad:
        wrong.append("no poisoned checkpoint had been registered")
    wrong += [f"{name} is not marked" for name in bad if storage / "run" / name not in marked]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    draw, right = random.Random(arguments.seed), 0
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="gradwatch-ray-") as name, ray_cluster() as cluster:
        for number in range(arguments.runs):
            # So often that poisoned checkpoints are registered before the rollback.
            strike, save_every, crash = draw.randrange(6, 30), draw.choice([1, 2]), bool(number % 2)
            wrong = mistakes(cluster.address, Path(name) / str(number), strike, save_every, crash=crash)
            right += not wrong
            how = f"step {strike}, saved every {save_every}{', and a second crash' if crash else ''}"
            print(f"{how}: {'; '.join(wrong) or 'right'}", flush=True)
    print(f"{right} of {arguments.runs} right")
    return 0 if right == arguments.runs else 1


if __name__ == "__main__":
    sys.exit(main())
