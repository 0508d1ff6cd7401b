"""How long a rollback keeps a job from training: from the exit of one command to the first line of the next.

usage: python -m benchmarks.restart [TIMES]

One job meets a NaN in each of its lives, and is rolled back as often. What the command itself takes from
its start to its first line is measured in the same run, and taken off.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS = 2.0
SCRIPT = Path(__file__).with_name("restart_job.py")
POLICY = """
apiVersion: gradwatch/v1
mode: enforce
rules: [{{name: any, match: {{}}, action: rollback}}]
checkpoints: {{root: {root}}}
budgets: [{{scope: job, max: {times}}}]
"""


def own_start(folder: Path, times: int) -> list[float]:
    """Seconds from a bare start of the command to its first line."""
    taken = []
    for index in range(times):
        log = folder / f"bare-{index}.log"
        began = time.time()
        process = subprocess.Popen([sys.executable, str(SCRIPT), str(log), str(folder)])
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.001)
        process.kill()
        process.wait()
        taken.append(float(log.read_text().split()[1]) - began)
    return taken


def gaps(folder: Path, times: int) -> list[float]:
    """Seconds from each exit to the next first line, under a policy."""
    root = folder / "checkpoints"
    root.mkdir()
    policy, log = folder / "policy.yaml", folder / "job.log"
    policy.write_text(POLICY.format(root=root, times=times))
    command = [sys.executable, "-m", "gradwatch.cli", "run", "--quiet", "--state-dir", str(folder / "state")]
    command += ["--policy", str(policy), "--", sys.executable, str(SCRIPT), str(log), str(root)]
    subprocess.run([*command, "--resume", "{resume}"], check=False, stderr=subprocess.DEVNULL)
    lines = [line.split() for line in log.read_text().splitlines()]
    exits = [float(at) for what, at in lines if what == "exit"]
    starts = [float(at) for what, at in lines if what == "first_line"]
    # The last exit is the halt that the budget asks for.
    return [start - exit_ for exit_, start in zip(exits, starts[1:], strict=False)]


def main(times: int) -> None:
    with tempfile.TemporaryDirectory(prefix="gradwatch-bench-") as name:
        folder = Path(name)
        own = statistics.median(own_start(folder, times))
        taken = gaps(folder, times)
    over = statistics.median(taken) - own
    verdict = "ok" if len(taken) == times and over <= LIMIT_SECONDS else "TOO SLOW"
    print(
        f"restart after a rollback: {over:.2f} s over the command's own start of {own:.2f} s (median of "
        f"{len(taken)}, worst {max(taken, default=0) - own:.2f} s; limit {LIMIT_SECONDS:g} s): {verdict}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
