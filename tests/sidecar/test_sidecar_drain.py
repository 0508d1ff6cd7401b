"""Draining while the processes of the run still end."""

from __future__ import annotations

import asyncio

from gradwatch.agent.sidecar.sidecar import Sidecar
from tests.sidecar.journals import Writer


class Collector:
    """Takes reports, and does something while it takes the first one."""

    connected = True

    def __init__(self, meanwhile):
        self.reports = []
        self.asked = 0
        self._meanwhile = meanwhile

    async def deliver(self, report, **_):
        if not self.reports:
            self._meanwhile()
        self.reports.append(report)

    async def ask(self):
        self.asked += 1


def drained(folder, meanwhile):
    collector = Collector(meanwhile)
    sidecar = Sidecar(folder, None, collector)
    sidecar.drain()
    asyncio.run(asyncio.wait_for(sidecar.ship(), 60))
    return sidecar, collector


def test_a_process_that_ends_while_the_rest_is_shipped_leaves_nothing_behind(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        sidecar, collector = drained(tmp_path, writer.kill)
    assert sidecar.drained().complete
    batches = [batch for report in collector.reports for batch in report.batches]
    assert sum(len(batch.records) for batch in batches) == 1
    assert len(collector.reports) == 2, "the second says that it has ended"
    assert collector.asked == 1


def test_what_ends_after_all_was_shipped_is_not_called_unshipped(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        sidecar, _ = drained(tmp_path, lambda: None)
    assert sidecar.drained().complete


def test_a_process_that_goes_on_is_not_waited_for(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        sidecar, collector = drained(tmp_path, lambda: None)
        assert sidecar.drained().complete
        assert len(collector.reports) == 1
