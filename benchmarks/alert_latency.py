"""How long it takes from a NaN in a 4-rank job to somebody's pager, by a real Prometheus and Alertmanager.

usage: python -m benchmarks.alert_latency [RUNS]

From the moment in which the rank's batch is corrupted to the webhook of Alertmanager being called, with
`examples/alertmanager.yaml` and the rules as they are; Prometheus scrapes and evaluates each second.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.overhead import spread
from tests import monitoring
from tests.monitoring import until

LIMIT_SECONDS = 3.0


def main(runs: int) -> None:
    """Measure."""
    seconds = []
    for number in range(runs):
        seconds.append(measure())
        print(f"run {number + 1} of {runs}: {seconds[-1]:.2f} s", flush=True)
    met = "met" if statistics.median(seconds) <= LIMIT_SECONDS else "MISSED"
    print(f"NaN to webhook, seconds {spread(seconds)}; limit {LIMIT_SECONDS}: {met}")


def measure() -> float:
    """One job."""
    with tempfile.TemporaryDirectory(prefix="gradwatch-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        pager = stack.enter_context(monitoring.pager())
        alertmanager = stack.enter_context(monitoring.alertmanager(folder, pager.port))
        job = stack.enter_context(monitoring.training(folder, ranks=4, bad_step=400))
        stack.enter_context(monitoring.prometheus(folder, [job.port], alertmanager))
        ((paged_at, _),) = until(lambda: pager.firing("GradwatchIncident"))
        return paged_at - float(job.planted.read_text())


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
