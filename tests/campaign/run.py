"""The campaign: random faults, planted in real jobs under `gradwatch run`, and are they named right?

usage: python -m tests.campaign.run [--faults 300] [--clean 100] [--seed N] [--world-sizes 2 3 4]

One job per world size. Right means: one incident per fault in the order they were planted, with the
rank, step, parameter, value, count and backward position of the plan, one origin, no tie, every
other rank clean; and none for a clean model.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator


def run_job(world_size: int, seed: int, faults: int, clean: int, folder: Path) -> tuple[list[Any], list[Any]]:
    """Run one job.

    Returns:
        Its cases, as planted, and its incidents, oldest first, as reported.

    Raises:
        RuntimeError: the job failed; with its output.
    """
    planted, report = folder / f"planted-{world_size}.json", folder / f"report-{world_size}.json"
    command = [
        *(sys.executable, "-m", "gradwatch.cli", "run", "--job", f"campaign-{world_size}"),
        *("--state-dir", str(folder / "state"), "--report", str(report), "--"),
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)),
        *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "tests.training.campaign", str(seed), str(faults), str(clean), str(planted)),
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"the job of world size {world_size} exited with {done.returncode}:\n{done.stderr}"
        )
    incidents = json.loads(report.read_text())["incidents"]
    return json.loads(planted.read_text()), sorted(incidents, key=lambda incident: incident["round"])


def mistakes(world_size: int, cases: list[Any], incidents: list[Any]) -> Iterator[str]:
    """What is wrong with the incidents of a job, a sentence each."""
    expected = [case for case in cases if case["planted"] is not None]
    steps = {case["planted"]["step"]: case for case in expected}
    for incident in incidents:
        if incident["step"] not in steps:
            yield f"an incident at step {incident['step']} where nothing was planted: {incident['first']}"
    named = {incident["step"]: incident for incident in incidents}
    for case in expected:
        plan = case["planted"]
        incident = named.get(plan["step"])
        if incident is None:
            yield f"no incident for {case}"
            continue
        first = incident["first"]
        for key, value in plan.items():
            if first[key] != value:
                yield f"{key} is {first[key]!r}, not {value!r}, for {case}"
        others = [rank for rank in range(world_size) if rank != plan["rank"]]
        if incident["clean_ranks"] != others or incident["unknown_ranks"]:
            yield f"clean {incident['clean_ranks']}, unknown {incident['unknown_ranks']} for {case}"
        if len(incident["origins"]) != 1 or incident["tie"]:
            yield f"{len(incident['origins'])} origins, tie {incident['tie']} for {case}"


def campaign(faults: int, clean: int, seed: int, world_sizes: list[int]) -> tuple[str, list[str]]:
    """Run it all; a table of the faults by kind, and what was wrong."""
    wrong: list[str] = []
    kinds: collections.Counter[str] = collections.Counter()
    clean_models = 0
    with tempfile.TemporaryDirectory(prefix="gradwatch-campaign-") as folder:
        for index, world_size in enumerate(world_sizes):
            share = [
                total // len(world_sizes) + (index < total % len(world_sizes)) for total in (faults, clean)
            ]
            cases, incidents = run_job(world_size, seed + index, share[0], share[1], Path(folder))
            wrong += [f"world size {world_size}: {text}" for text in mistakes(world_size, cases, incidents)]
            for case in cases:
                if case["planted"] is None:
                    clean_models += 1
                else:
                    kinds[f"{case['model']:<12} {case['dtype'].removeprefix('torch.'):<9}"] += 1
    table = "\n".join(f"  {kind} {number:4}" for kind, number in sorted(kinds.items()))
    return f"{table}\n  {sum(kinds.values())} faults planted, {clean_models} clean models", wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--clean", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 3, 4])
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    table, wrong = campaign(arguments.faults, arguments.clean, arguments.seed, arguments.world_sizes)
    print(table)
    for text in wrong:
        print(f"  WRONG {text}")
    print(f"{'all named right' if not wrong else f'{len(wrong)} mistakes'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
