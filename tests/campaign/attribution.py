"""The catalogue of faults, at random places in real jobs: what is said of each, and is it right?

usage: python -m tests.campaign.attribution [--runs 18] [--clean 150] [--overflows 50] [--seed N] [--only …]

The jobs run under `gradwatch run`. Prints a table of what was planted and what was named. Exits
with 1 unless rank, step, phase, cause, parameter and micro-batch are right of every fault, operator, module
and what is broken of 95 %, no device is named where none is, and clean runs have no incident.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tests.ranks import REPOSITORY
from tests.training.catalogue import CLASSES, CLEAN, REPLICA_CHECK_EVERY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What must be right of every fault, and what of MOSTLY_RIGHT of them. `device`: that none is named where none
# is broken, or it cannot be told; `found`: that one is named where it is.
ALWAYS = ("rank", "step", "phase", "cause", "parameter", "microbatch", "origins", "tie", "device")
MOSTLY = ("operator", "module", "found", "judgement")
MOSTLY_RIGHT = 0.95
NONE = "none"
# A report holds the newest 100 incidents.
MODELS_OF_A_JOB = 90


@dataclass
class Tally:
    """What was named of the faults of one class.

    Attributes:
        named: how often which cause was.
        right: by field, how often it was; of so many `asked`.
    """

    runs: int = 0
    named: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)


def run_job(
    job: str, world_size: int, seed: int, plan: list[str], folder: Path
) -> tuple[list[Any], list[Any]]:
    """Run one job.

    Returns:
        Its cases, as planted, and its incidents, as reported.

    Raises:
        RuntimeError: the job failed; with its output.
    """
    written, planted = folder / f"plan-{job}.json", folder / f"planted-{job}.json"
    report = folder / f"report-{job}.json"
    written.write_text(json.dumps(plan))
    command = [
        *(sys.executable, "-m", "gradwatch.cli", "run", "--job", job),
        *("--state-dir", str(folder / "state"), "--report", str(report), "--"),
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)),
        *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
        *("-m", "tests.training.attribution", str(seed), str(written), str(planted)),
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "GRADWATCH_REPLICA_CHECK_EVERY": str(REPLICA_CHECK_EVERY),
    }
    done = subprocess.run(command, env=env, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{job} exited with {done.returncode}:\n{done.stderr}")
    reported = json.loads(report.read_text())
    if reported["ranks_watched"] != world_size or reported["incidents_left_out"]:
        raise RuntimeError(
            f"{job} was not watched on all ranks, or its report leaves incidents out:\n{done.stderr}"
        )
    return json.loads(planted.read_text()), reported["incidents"]


def named(incident: dict[str, Any]) -> dict[str, Any]:
    """What an incident says, in the fields that a case expects."""
    first = incident["first"] or {}
    accused = any(guess["kind"] == "device" for guess in incident.get("likely", ()))
    said = {key: first.get(key) for key in ("rank", "phase", "parameter", "microbatch", "operator")}
    return said | {
        "step": incident["step"],
        "cause": incident["cause"],
        "origins": [origin["rank"] for origin in incident["origins"]],
        "tie": incident["tie"],
        "module": (first.get("replay") or {}).get("module"),
        "gradient": first.get("gradient"),
        "device": accused,
        "found": accused,
        "judgement": incident.get("judgement"),
    }


def judge(cases: Iterable[dict[str, Any]], incidents: list[Any], tallies: dict[str, Tally]) -> Iterator[str]:
    """Count what is right; what is wrong, a sentence each."""
    for case in cases:
        tally = tallies.setdefault(case["class"], Tally())
        tally.runs += 1
        steps = range(case["from"], case["from"] + case["steps"])
        about_it = [one for one in incidents if one["step"] is None or one["step"] in steps]
        found = [named(one) for one in about_it]
        expected = case["expected"] or {}
        if expected and "found" not in expected:
            expected = {"device": False, **expected}
        said = found[0] if found else {}
        tally.named[said.get("cause") or NONE] += 1
        about = f"of {case['class']!r}, {case['fault']}"
        if len(found) != (1 if expected else 0):
            yield f"{len(found)} incidents {about}: {found}"
        for key, value in expected.items():
            tally.asked[key] += 1
            right = key in said and said[key] == value
            tally.right[key] += right
            if not right and found:
                verdict = " ".join(about_it[0].get("verdict", ()))
                yield f"{key} is {said[key]!r}, not {value!r}, {about}; said was: {verdict}"


def print_table(tallies: dict[str, Tally]) -> None:
    """The confusion table: what was planted, what was named, and what of it is right."""
    causes = sorted({cause for tally in tallies.values() for cause in tally.named} - {NONE})
    table = Table(title="planted, and the cause that was named; how much of it is right, in percent")
    for column in ("planted", "runs", *causes, NONE, *ALWAYS, *MOSTLY):
        table.add_column(column, justify="left" if column == "planted" else "right")
    for name, tally in tallies.items():
        counts = [str(tally.named[cause] or "") for cause in (*causes, NONE)]
        shares = [percent(tally, key) for key in (*ALWAYS, *MOSTLY)]
        table.add_row(name, str(tally.runs), *counts, *shares)
    Console(width=240).print(table)


def percent(tally: Tally, key: str) -> str:
    asked = tally.asked[key]
    return f"{100 * tally.right[key] / asked:.0f}" if asked else ""


def passed(tallies: dict[str, Tally], wrong: list[str]) -> bool:
    """Whether all that must be right is."""
    mostly = [sum(tally.right[key] for tally in tallies.values()) for key in MOSTLY]
    asked = [sum(tally.asked[key] for tally in tallies.values()) for key in MOSTLY]
    enough = all(right >= MOSTLY_RIGHT * of for right, of in zip(mostly, asked, strict=True))
    # A sentence begins with the field that it is about.
    return enough and all(text.startswith(MOSTLY) for text in wrong)


def jobs_of(plan: list[str]) -> list[list[str]]:
    """Divide a plan."""
    return [plan[start : start + MODELS_OF_A_JOB] for start in range(0, len(plan), MODELS_OF_A_JOB)]


def campaign(plan: list[str], seed: int, world_sizes: list[int]) -> tuple[dict[str, Tally], list[str]]:
    """Run it all; what was named, by class, and what was wrong.

    Args:
        plan: names of classes; each world size gets its share of them.
        seed: of where the faults are.
        world_sizes: of the jobs.
    """
    tallies: dict[str, Tally] = {name: Tally() for name in dict.fromkeys(plan)}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="gradwatch-attribution-") as folder:
        for index, world_size in enumerate(world_sizes):
            share = plan[index :: len(world_sizes)]
            random.Random(seed).shuffle(share)
            for number, part in enumerate(jobs_of(share)):
                began = time.monotonic()
                job = f"attribution-{world_size}-{number}"
                cases, incidents = run_job(job, world_size, seed + 1000 * index + number, part, Path(folder))
                print(f"{job}: {len(cases)} models in {time.monotonic() - began:.0f} s", flush=True)
                wrong += [f"{text} (world size {world_size})" for text in judge(cases, incidents, tallies)]
    return tallies, wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=18, help="of each class")
    parser.add_argument("--clean", type=int, default=150)
    parser.add_argument("--overflows", type=int, default=50, help="runs with overflows of a GradScaler")
    parser.add_argument("--only", nargs="+", choices=[*CLASSES, *CLEAN], help="of these classes only")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 3, 4])
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    numbers = dict.fromkeys(CLASSES, arguments.runs)
    for name, number in (("clean", arguments.clean), ("scaler overflow", arguments.overflows)):
        third = number // 3
        numbers |= {name: number - 2 * third, f"{name}, FSDP2": third, f"{name}, mask of -inf": third}
    plan = [
        name
        for name, number in numbers.items()
        if arguments.only is None or name in arguments.only
        for _ in range(number)
    ]
    tallies, wrong = campaign(plan, arguments.seed, arguments.world_sizes)
    print_table(tallies)
    for text in wrong:
        print(f"  WRONG {text}")
    right = passed(tallies, wrong)
    print("all named right" if not wrong else f"{len(wrong)} mistakes{', as may be' if right else ''}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
