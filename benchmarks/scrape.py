"""How long a scrape of a collector with a job of 8,192 ranks takes, every one of them contaminated or none.

usage: python -m benchmarks.scrape [RANKS]

In one process, from the state to the text, as GET /metrics does it.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.overhead import spread
from gradwatch.collector.metrics.exposition import Source, new_registry, render
from tests.collector.history import NOW, Told, batch, hello, nonfinite, progress

if TYPE_CHECKING:
    from gradwatch.collector.model import State
    from gradwatch.collector.observations import Batch, Progress

LIMIT_SECONDS = 0.1
TIMES = 20
_ROUND = 5


def main(ranks: int) -> None:
    """Measure both jobs, in both formats."""
    for bad in (False, True):
        state = state_of(ranks, bad=bad)
        source = Source(
            state=lambda state=state: state,
            dossiers=dict,
            policies_reloaded=lambda: True,
            access_reloaded=lambda: True,
            store_writable=lambda: True,
            clock=lambda: NOW,
        )
        registry = new_registry(source)
        for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
            seconds = []
            for _ in range(TIMES):
                began = time.perf_counter()
                text, _ = render(registry, accept)
                seconds.append(time.perf_counter() - began)
            met = "met" if statistics.median(seconds) <= LIMIT_SECONDS else "MISSED"
            series = sum(not line.startswith(b"#") for line in text.splitlines())
            said = f"{ranks} ranks, {'all' if bad else 'none'} of them bad, {accept.partition(';')[0]}"
            measured = f"{series} series, {len(text)} bytes, seconds {spread(seconds)}"
            print(f"{said}: {measured}; limit {LIMIT_SECONDS}: {met}")


def state_of(ranks: int, *, bad: bool) -> State:
    """What a collector knows of one job, in which rank 0 was first, or nobody."""
    parts: list[Batch | Progress] = []
    for rank in range(ranks):
        name = f"r{rank}"
        bodies = [hello(rank, ranks, node=f"gpu-{rank // 8:04}")]
        if bad:
            bodies.append(nonfinite(_ROUND + min(rank, 1)))
        parts += [batch(name, 0, *bodies), progress(name, _ROUND + 2, len(bodies), bad_rounds=int(bad))]
    return Told().tell(*parts).state


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 8192)
