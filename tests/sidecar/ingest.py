"""A real gRPC ingest service that does as little as a collector must: remember, then acknowledge."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import grpc

from gradwatch.protos.v1 import gradwatch_pb2 as pb
from gradwatch.protos.v1 import gradwatch_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Ingest(rpc.IngestServicer):
    """Remembers all reports; can be told to fail.

    Attributes:
        refusals: this many reports are remembered and then *not* acknowledged: the stream breaks.
        silent: reports are swallowed without a word.
        greetings: what every sidecar is told after its hello.
    """

    def __init__(self) -> None:
        self.reports: list[pb.Report] = []
        self.streams = 0
        self.hellos: list[pb.Sidecar] = []
        self.refusals = 0
        self.silent = False
        self.greetings: list[pb.Directive] = []
        self.address = ""
        self._open: dict[grpc.aio.ServicerContext, asyncio.Lock] = {}
        self._server: grpc.aio.Server | None = None

    async def Stream(self, request_iterator, context):  # noqa: N802 - the service's name for it
        self.streams += 1
        self._open[context] = asyncio.Lock()
        try:
            await self._answer(request_iterator, context)
        finally:
            del self._open[context]

    async def _answer(self, request_iterator, context):
        await self._write(context, pb.Directive(welcome=pb.Welcome(version="test")))
        async for report in request_iterator:
            if report.HasField("sidecar"):
                self.hellos.append(report.sidecar)
            self.reports.append(report)
            if self.silent:
                continue
            if self.refusals and (report.batches or report.progress):
                self.refusals -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "told to fail")
            if report.HasField("sidecar"):
                for directive in self.greetings:
                    await self._write(context, directive)
            for job in self.hellos[-1].jobs:
                ended = [body.launch for body in self.bodies("launch_ended")]
                document = json.dumps({"job": job, "launches_ended": ended}).encode()
                await self._write(context, pb.Directive(status=pb.JobStatus(job=job, document=document)))
            await self._write(context, pb.Directive(acked=report.id))

    async def push(self, **directive) -> None:
        """Tell every sidecar that is connected."""
        for context in list(self._open):
            await self._write(context, pb.Directive(**directive))

    async def _write(self, context, directive: pb.Directive) -> None:
        async with self._open[context]:
            await context.write(directive)

    async def start(self, port: int = 0) -> None:
        """Listen; `address` is then set."""
        self._server = grpc.aio.server()
        rpc.add_IngestServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def stop(self) -> None:
        """Go away at once."""
        if self._server is not None:
            await self._server.stop(None)

    def write_address(self, state_dir: Path) -> None:
        """Leave the address where a collector does."""
        (state_dir / "collector.json").write_text(json.dumps({"pid": 0, "grpc": self.address, "http": ""}))

    def seqs(self, incarnation: str) -> list[int]:
        """The sequence numbers received of a journal, in order, with repetitions."""
        return [
            record.seq
            for report in self.reports
            for batch in report.batches
            if batch.incarnation == incarnation
            for record in batch.records
        ]

    def bodies(self, kind: str) -> list:
        """The received records of a kind."""
        return [
            getattr(record, kind)
            for report in self.reports
            for batch in report.batches
            for record in batch.records
            if record.WhichOneof("body") == kind
        ]

    def progress(self, incarnation: str) -> list[pb.Progress]:
        """The progress received of a journal, in order."""
        return [
            progress
            for report in self.reports
            for progress in report.progress
            if progress.incarnation == incarnation
        ]


@contextlib.asynccontextmanager
async def serving(kind: type[Ingest] = Ingest) -> AsyncIterator[Ingest]:
    """An ingest service for the duration; one that is not stopped would hang whoever collects it."""
    ingest = kind()
    await ingest.start()
    try:
        yield ingest
    finally:
        await ingest.stop()


async def until(condition, seconds: float = 60.0) -> None:
    """Wait for a condition, at most so long."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come true"
        await asyncio.sleep(0.02)
