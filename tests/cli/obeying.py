"""A launcher that obeys, with no collector: the test leaves the orders in its spool, as a sidecar does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.cli.command import environment, finish, spools, until

POLICY = """\
apiVersion: gradwatch/v1
mode: enforce
guard: {{on_nonfinite: skip_step, max_consecutive: 2}}
checkpoints: {{root: {root}}}
"""

# Notes each start; what else it does is its second argument. Every process carries LOG in its arguments.
COMMAND = """
import json, os, signal, subprocess, sys, time
log, mode = sys.argv[1:3]
def note(what):
    with open(log, "a") as file:
        file.write(json.dumps(what) + "\\n")
def own():
    ours = ("GRADWATCH_R", "GRADWATCH_SK", "GRADWATCH_G")
    return {name: value for name, value in os.environ.items() if name.startswith(ours)}
def save(number, frame):
    time.sleep(0.3)
    with open(log + ".saved", "w") as file:
        file.write("saved")
    sys.exit(0)
if mode == "saves":
    signal.signal(signal.SIGTERM, save)
if mode == "worker":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "workers":
    worker = [sys.executable, __file__, log, "worker"]
    workers = [
        subprocess.Popen(worker, start_new_session=True, stdout=subprocess.PIPE) for _ in range(2)
    ]
    for worker in workers:
        worker.stdout.readline()
note({"mode": mode, "pid": os.getpid(), "argv": sys.argv[3:], "env": own(), "at": time.monotonic()})
print("ready", flush=True)
if mode == "fails" and os.environ["GRADWATCH_GENERATION"] == "0":
    sys.exit(3)
while True:
    time.sleep(600)
"""


class Launcher:
    """`gradwatch run` of the job "j" with a policy, and a command that notes each of its starts.

    Args:
        folder: for everything; two launchers with the same one share the state folder.
        mode: what the command does: waits, saves, workers, fails.
        arguments: of the command.
        rules: in place of those that users have.
        job: the job's name.
    """

    def __init__(
        self, folder: Path, mode: str = "waits", *arguments: str, job: str = "j", **rules: object
    ) -> None:
        self.root = folder / "ckpts"
        self.root.mkdir(exist_ok=True)
        (folder / "policy.yaml").write_text(POLICY.format(root=self.root))
        (folder / "command.py").write_text(COMMAND)
        self.log = folder / f"{job}.log"
        self.report_file = folder / f"{job}.json"
        self.job = job
        known = set(spools(folder / "state"))
        given = {"folder": str(folder), "job": job, "report": str(self.report_file)}
        given["rules"] = {"grace_seconds": 2.0, "left_seconds": 0.5, **rules}
        words = [
            json.dumps(given),
            sys.executable,
            str(folder / "command.py"),
            str(self.log),
            mode,
            *arguments,
        ]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONPATH=str(Path(__file__).parents[2])),
        )
        (self.spool,) = until(lambda: set(spools(folder / "state")) - known)
        (started,) = until(lambda: self.records("launch_started"))
        self.launch: str = started["launch"]

    def order(self, action: str, generation: int = 0, id_: str = "", **more: object) -> None:
        """Leave an order in the spool, in one step."""
        order = {"id": id_, "job": self.job, "launch": self.launch, "generation": generation, **more}
        new = self.spool / ".order.json.new"
        new.write_text(json.dumps(order | {"action": f"ACTION_{action}"}))
        new.replace(self.spool / "order.json")

    def records(self, kind: str) -> list[dict[str, Any]]:
        """What it has journalled of a kind."""
        lines = [
            json.loads(line)
            for path in self.spool.glob("launch-*.jsonl")
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        return [line[kind] for line in lines if kind in line]

    def until_records(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait for the so-manieth record of a kind."""
        return until(lambda: len(found := self.records(kind)) >= count and found)

    def starts(self, count: int) -> list[dict[str, Any]]:
        """Wait until the command has noted so many starts."""

        def found() -> list[dict[str, Any]]:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            notes = [json.loads(line) for line in lines]
            return [note for note in notes if note["mode"] != "worker"]

        return until(lambda: len(notes := found()) >= count and notes)

    def pids(self) -> list[int]:
        """All processes that the command has ever noted, workers too."""
        return [json.loads(line)["pid"] for line in self.log.read_text().splitlines()]

    def end(self) -> tuple[int, str, dict[str, Any]]:
        """Its exit code, its lines and its report, once it has ended."""
        result = finish(self.process)
        return result.returncode, result.stderr, json.loads(self.report_file.read_text())


def alive(pids: list[int]) -> list[int]:
    """Those that still run."""
    return [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> int:
    """Run the launcher."""
    from gradwatch.cli.launcher import policy_file
    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.launch import launch
    from gradwatch.cli.launcher.lifecycle import Rules

    given = json.loads(sys.argv[1])
    folder = Path(given["folder"])
    return launch(
        RunConfig(
            command=tuple(sys.argv[2:]),
            job=given["job"],
            state_dir=folder / "state",
            # The discard port: nobody is there.
            collector="127.0.0.1:9",
            policy=policy_file.read(folder / "policy.yaml"),
            rules=Rules(**given["rules"]),
            report=Path(given["report"]),
            drain_seconds=0.0,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
