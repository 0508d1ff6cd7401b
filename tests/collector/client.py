"""A sidecar of the tests' own: a real stream to a real collector."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import grpc

from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PATIENCE = 60.0


def hello(incarnation: str, rank: int, world_size: int = 2, job: str = "j") -> pb.Record:
    body = pb.Hello(
        incarnation=incarnation,
        job=job,
        attempt_key="k",
        rank=rank,
        world_size=world_size,
        node=f"n{rank}",
        pid=100 + rank,
        device="cpu",
    )
    return pb.Record(seq=0, at=time.time(), hello=body)


def nonfinite(seq: int, round_: int) -> pb.Record:
    bad = pb.BadGradient(
        parameter="a.weight",
        module="a",
        module_class="Linear",
        value=pb.VALUE_NAN,
        count=1,
        backward_position=0,
    )
    body = pb.NonFinite(round=round_, step=round_, microbatch=0, gradients=[bad], source="ddp-bucket")
    return pb.Record(seq=seq, at=time.time(), nonfinite=body)


def launch_started(job: str = "j") -> pb.Record:
    return pb.Record(seq=0, at=time.time(), launch_started=pb.LaunchStarted(job=job, launch="l", node="n0"))


def launch_ended(seq: int = 1, exit_code: int = 1, job: str = "j") -> pb.Record:
    body = pb.LaunchEnded(job=job, launch="l", exit_code=exit_code, ended_by="command")
    return pb.Record(seq=seq, at=time.time(), launch_ended=body)


def batch(incarnation: str, *records: pb.Record) -> pb.Batch:
    return pb.Batch(incarnation=incarnation, records=records)


def one_bad_rank(job: str = "j", round_: int = 5) -> pb.Report:
    """Rank 0 of two was bad, and rank 1 clean."""
    bad, clean = f"{job}-0", f"{job}-1"
    return pb.Report(
        batches=[
            batch(bad, hello(bad, 0, job=job), nonfinite(1, round_)),
            batch(clean, hello(clean, 1, job=job)),
        ],
        progress=[
            progress(bad, round_ + 1, 2, bad_rounds=1),
            progress(clean, round_ + 1, 1),
        ],
    )


def progress(incarnation: str, round_: int, records: int, **fields: Any) -> pb.Progress:
    return pb.Progress(
        incarnation=incarnation,
        round=round_,
        step=round_,
        journal_records=records,
        train_seconds=round_,
        **fields,
    )


class Sidecar:
    """One stream. What comes back is kept in order in `got`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._last_id = 0
        self.got: list[pb.Directive] = []

    async def send(self, report: pb.Report) -> None:
        """Send it and wait for its acknowledgement."""
        self._last_id += 1
        report.id = self._last_id
        await self._call.write(report)
        await self.until(lambda directive: directive.HasField("acked") and directive.acked == report.id)

    async def greet(self, *jobs: str) -> None:
        """Say who this is, and ask how the jobs are."""
        await self.send(pb.Report(sidecar=pb.Sidecar(id="s", node="n0", version="0", jobs=jobs)))

    async def until(self, wanted: Callable[[pb.Directive], bool]) -> pb.Directive:
        while True:
            directive = await asyncio.wait_for(self._call.read(), PATIENCE)
            assert directive is not grpc.aio.EOF
            self.got.append(directive)
            if wanted(directive):
                return directive

    async def until_status(self, wanted: Callable[[dict[str, Any]], bool] = bool) -> dict[str, Any]:
        """The newest status, once it is as wanted."""
        while not (self.statuses and wanted(self.statuses[-1])):
            await self.until(lambda directive: directive.HasField("status"))
        return self.statuses[-1]

    @property
    def statuses(self) -> list[dict[str, Any]]:
        return [
            json.loads(directive.status.document) for directive in self.got if directive.HasField("status")
        ]


@contextlib.asynccontextmanager
async def sidecar(address: str, *jobs: str) -> AsyncIterator[Sidecar]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = rpc.IngestStub(channel).Stream()
        it = Sidecar(call)
        await it.greet(*jobs)
        yield it
        call.cancel()
