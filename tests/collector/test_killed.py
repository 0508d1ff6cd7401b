"""A real collector process, killed again and again: nothing is lost and nothing counts twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from gradwatch.collector import reader, statedir
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import batch, hello, nonfinite, progress, sidecar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KILLS = 20
REPORTS = 400
RECORDS = 3

COLLECTOR = """
import asyncio, dataclasses, json, pathlib, sys
from gradwatch.collector.app import CollectorConfig, serve

config = CollectorConfig(pathlib.Path(sys.argv[1]), grpc="127.0.0.1:0", http="127.0.0.1:0")
say = lambda info: print(json.dumps(dataclasses.asdict(info)), flush=True)
asyncio.run(serve(config, on_ready=say))
"""


@contextlib.contextmanager
def collector(state_dir: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [sys.executable, "-c", COLLECTOR, str(state_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def story() -> list[pb.Report]:
    """Rank 0 is bad in every round, a round a report; rank 1 never is."""
    reports = [pb.Report(batches=[batch("a", hello("a", 0)), batch("b", hello("b", 1))])]
    for number in range(REPORTS):
        seqs = range(1 + number * RECORDS, 1 + (number + 1) * RECORDS)
        reports.append(
            pb.Report(
                batches=[batch("a", *(nonfinite(seq, number) for seq in seqs))],
                progress=[
                    progress("a", number + 1, seqs.stop, bad_rounds=number + 1, last_bad_round=number),
                    progress("b", number + 1, 1, last_bad_round=number),
                ],
            )
        )
    return reports


async def tell(address: str, left: list[pb.Report]) -> None:
    """Send what is left; what is acknowledged is left no more."""
    with contextlib.suppress(grpc.aio.AioRpcError, AssertionError, asyncio.InvalidStateError):
        async with sidecar(address) as it:
            while left:
                await it.send(left[0])
                left.pop(0)


@pytest.mark.timeout(180)
def test_killed_at_any_time(tmp_path: Path):
    left = story()
    chance = random.Random(7)

    async def kill_soon(process: subprocess.Popen[str], address: str) -> None:
        telling = asyncio.create_task(tell(address, left))
        await asyncio.wait({telling}, timeout=chance.uniform(0.005, 0.05))
        process.send_signal(signal.SIGKILL)
        await asyncio.wait_for(telling, 30)

    acknowledged = []
    for _ in range(KILLS):
        with collector(tmp_path) as (process, info):
            before = len(left)
            asyncio.run(kill_soon(process, info["grpc"]))
            acknowledged.append(before - len(left))
    # It was in the midst of its work that it was killed.
    assert sum(acknowledged) > 0
    assert left
    with collector(tmp_path) as (_, info):
        asyncio.run(asyncio.wait_for(tell(info["grpc"], left), 60))
    assert not left

    with reader.opened(tmp_path) as found:
        events = [
            (event.incarnation, event.seq)
            for event in found.events("j", limit=10_000)
            if event.kind != "progress"
        ]
        assert sorted(events) == [("a", seq) for seq in range(1 + REPORTS * RECORDS)] + [("b", 0)]
        (incident,) = found.incidents()
        assert incident.first.rank == 0
        assert (incident.round, incident.last_round) == (0, REPORTS - 1)
        assert incident.clean_ranks == [1]
        assert found.job("j").dropped == {}
        assert found._state.jobs["j"].nonfinite_events == {"unknown": REPORTS * RECORDS}
        assert found._state.jobs["j"].incidents_confirmed == {"unknown": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(tmp_path: Path, number: signal.Signals):
    with collector(tmp_path) as (process, info):
        assert statedir.holder(tmp_path).pid == info["pid"] == process.pid
        process.send_signal(number)
        process.send_signal(number)
        assert process.wait(10) == 0
    assert not (tmp_path / statedir.INFO).exists()
