"""Run the field programs, plain and under `gradwatch run`, and hold each verdict against what is right.

usage: python -m tests.field.run [--folder FOLDER] [NAME…]

`expect.json` of the folder has, by program, `want`: a list of `KEY OP VALUE`, where KEY is a field of the
incident's `first` (`step`, `replay.module`), of the incident (`i.verdict`) or of the report (`r.warnings`),
and OP one of = != ~ !~ (one of `a|b`, or a regular expression); `["none"]` for no incident. `ranks` is 2
unless given, 0 for no torchrun. A program is right if all of that holds, every rank was watched, no hardware
is accused, and exit code and digests of the weights are those of the plain run. Exits with 1 unless all are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 300
_WANT = re.compile(r"([\w.]+)(!?[=~])(.*)", re.DOTALL)
_ACCUSES = re.compile(r"(?i)\bdevices?\b|\bhardware\b|\btake \S+( of \S+ \S+)? out\b")
_DIGEST = re.compile(r"HASH rank \d+ [0-9a-f]{16}")
# torch and gloo may abort at exit, watched or not: https://github.com/pytorch/pytorch/issues/56297
_ABORTED = "terminate called"


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    output: str
    errors: str

    @property
    def digests(self) -> list[str]:
        """Those of the weights, by rank."""
        return sorted(_DIGEST.findall(self.output))


def wrong_with(folder: Path, name: str, case: Mapping[str, Any], work: Path) -> list[str]:
    """Run a program; what of its verdict is not right, a phrase each."""
    plain = _start(command_of(folder, name, case), folder, work, case)
    report_file = work / "report.json"
    options = ["--state-dir", str(work / "state"), "--report", str(report_file), "--"]
    ours = [sys.executable, "-m", "gradwatch.cli", "run", *options]
    watched = _start([*ours, *command_of(folder, name, case)], folder, work, case)
    if not report_file.exists():
        return [f"no report, exit code {watched.code}: {watched.errors[-300:]}"]
    report = json.loads(report_file.read_text())
    found = judged(report, case["want"])
    if report["ranks_watched"] != report["world_size"] or not report["ranks_watched"]:
        found.append(f"{report['ranks_watched']} of {report['world_size']} ranks were watched")
    if plain.code != watched.code:
        found.append(f"exit code {watched.code}, and {plain.code} when it is not watched")
    if plain.digests != watched.digests:
        found.append("the weights are not those of the plain run")
    return found


def command_of(folder: Path, name: str, case: Mapping[str, Any]) -> list[str]:
    """What starts a program."""
    ranks = case.get("ranks", 2)
    torchrun = [
        *("-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
    ]
    return [sys.executable, *(torchrun if ranks else []), str(folder / name)]


def judged(report: Mapping[str, Any], wants: Sequence[str]) -> list[str]:
    """What of a report is not as it should be, a phrase each. Pure."""
    incidents = sorted(report["incidents"], key=lambda one: (one["generation"], one["round"]))
    if [*wants] == ["none"]:
        return [f"an incident: {one['title']}" for one in incidents]
    accused = [one for one in incidents if _ACCUSES.search(" ".join(one["verdict"])) or _names_a_device(one)]
    if accused:
        return [f"hardware is accused: {' '.join(accused[0]['verdict'])}"]
    incident = incidents[0] if incidents else None
    found = []
    for want in wants:
        match = _WANT.fullmatch(want)
        if match is None:
            raise ValueError(f"{want!r} is no expectation")
        key, operator, value = match.groups()
        roots = {"i": incident, "r": report}
        root, _, rest = key.partition(".")
        have = _at(roots[root], rest) if root in roots and rest else _at((incident or {}).get("first"), key)
        text = " ".join(map(str, have)) if isinstance(have, list) else str(have)
        holds = text in value.split("|") if operator[-1] == "=" else bool(re.search(value, text))
        if holds == operator.startswith("!"):
            found.append(f"{key} is {text[:200]!r}, not {operator}{value}")
    return found


def _names_a_device(incident: Mapping[str, Any]) -> bool:
    return any(guess["kind"] == "device" for guess in incident["likely"])


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = None if value is None else value.get(part)
    return value


def _start(command: Sequence[str], folder: Path, work: Path, case: Mapping[str, Any]) -> Ended:
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
        "PYTHONWARNINGS": "ignore",
        **case.get("env", {}),
    }
    for _ in range(2):
        done = subprocess.run(
            command, env=env, cwd=work, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if _ABORTED not in done.stderr:
            break
    return Ended(done.returncode, done.stdout, done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=PROGRAMS)
    parser.add_argument("names", nargs="*", help="parts of the programs' names; all if none is given")
    given = parser.parse_args()
    cases = json.loads((given.folder / "expect.json").read_text())
    chosen = [name for name in cases if not given.names or any(part in name for part in given.names)]
    right = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as work:
            found = wrong_with(given.folder.resolve(), name, cases[name], Path(work))
        right += not found
        print(
            f"{'right' if not found else 'WRONG':6}{name}{': ' if found else ''}{'; '.join(found)}",
            flush=True,
        )
    print(f"{right} of {len(chosen)} right")
    sys.exit(right != len(chosen))


if __name__ == "__main__":
    main()
