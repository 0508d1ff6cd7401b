"""The sidecar as a process: killed, told to drain, orphaned; against a real gRPC service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cleanup, cursor
from gradwatch.collector.app import running as collecting
from tests.collector.running import config, http
from tests.sidecar.ingest import serving, until
from tests.sidecar.journals import Writer


@pytest.fixture
def state_dir(tmp_path):
    (tmp_path / "spool" / "mine").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def own(state_dir):
    return state_dir / "spool" / "mine"


def command(own, state_dir, *more: object) -> list[str]:
    arguments = ["sidecar", "--spool", own, "--state-dir", state_dir, *more]
    return [sys.executable, "-m", "gradwatch.cli", *map(str, arguments)]


@contextlib.asynccontextmanager
async def running(own, state_dir, *more: object):
    process = await asyncio.create_subprocess_exec(
        *command(own, state_dir, *more), stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def stop(process) -> int:
    process.send_signal(signal.SIGTERM)
    return await asyncio.wait_for(process.wait(), 30)


def test_it_ships_as_it_happens_and_keeps_the_status(state_dir, own):
    async def scenario():
        async with serving() as ingest:
            ingest.write_address(state_dir)
            with Writer(own) as writer:
                async with running(own, state_dir, "--job", "job") as process:
                    writer.fault()
                    await until(lambda: ingest.seqs(writer.incarnation) == [0])
                    writer.fault()
                    writer.progress(1)
                    await until(lambda: ingest.progress(writer.incarnation))
                    await until((own / spool.STATUS).exists)
                    await stop(process)
                    assert ingest.seqs(writer.incarnation) == [0, 1]
                    assert list(ingest.hellos[0].jobs) == ["job"]
        assert json.loads((own / spool.STATUS).read_bytes())["job"] == "job"

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_it_loses_nothing(state_dir, own, seed):
    """Records go on being written while sidecars are killed; every one arrives in the end."""

    async def scenario():
        draw = random.Random(seed)
        async with serving() as ingest:
            ingest.write_address(state_dir)
            with Writer(own, segment_bytes=300) as writer:
                for _ in range(3):
                    async with running(own, state_dir) as process:
                        seen = len(ingest.reports)
                        for _ in range(draw.randrange(5, 40)):
                            writer.fault()
                        await until(lambda seen=seen: len(ingest.reports) > seen)
                        ingest.refusals = draw.randrange(2)
                        await asyncio.sleep(draw.random() * 0.3)
                        process.kill()
                        await process.wait()
                async with running(own, state_dir) as process:
                    await until(lambda: set(ingest.seqs(writer.incarnation)) == set(range(writer.records)))
                    await stop(process)

    asyncio.run(scenario())


def test_a_restarted_collector_on_another_port_is_found_again(state_dir, own):
    async def scenario():
        async with serving() as first, serving() as second:
            first.write_address(state_dir)
            with Writer(own) as writer:
                async with running(own, state_dir) as process:
                    writer.fault()
                    await until(lambda: first.seqs(writer.incarnation))
                    await first.stop()
                    writer.fault()
                    second.write_address(state_dir)
                    await until(lambda: second.seqs(writer.incarnation) == [1])
                    await stop(process)

    asyncio.run(scenario())


def test_a_drain_ships_the_end_and_says_that_nothing_is_left(state_dir, own):
    async def scenario():
        async with serving() as ingest:
            ingest.write_address(state_dir)
            with Writer(own) as writer:
                writer.fault()
                writer.kill()
                async with running(own, state_dir) as process:
                    assert await stop_when_up(process, own) == 0
                assert ingest.seqs(writer.incarnation) == [0]
                assert ingest.progress(writer.incarnation)[-1].ended
        left = json.loads((own / cleanup.DRAINED).read_bytes())
        assert (left["complete"], left["journals"], left["unread_bytes"]) == (True, 0, 0)

    asyncio.run(scenario())


async def stop_when_up(process, own) -> int:
    await until(lambda: spool.is_locked(own / spool.SIDECAR_LOCK))
    return await stop(process)


def test_a_drain_without_a_collector_ends_in_time_and_says_what_remains(state_dir, own):
    with Writer(own) as writer:
        writer.fault()
        writer.kill()
        done = subprocess.run(
            command(own, state_dir, "--drain", "--drain-timeout", 0.5),
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert done.returncode == 1
    left = json.loads((own / cleanup.DRAINED).read_bytes())
    assert left["journals"] == 1
    assert left["unread_bytes"] > 0
    assert str(own) in done.stderr
    assert "the next run ships them" in done.stderr


def test_the_next_run_ships_what_an_earlier_one_left_and_removes_it(state_dir, own):
    async def scenario():
        earlier = state_dir / "spool" / "earlier"
        earlier.mkdir()
        with Writer(earlier) as writer:
            writer.fault()
            writer.kill()
        async with serving() as ingest:
            ingest.write_address(state_dir)
            async with running(own, state_dir) as process:
                await until(lambda: not earlier.exists())
                await stop(process)
            assert ingest.seqs(writer.incarnation) == [0]

    asyncio.run(scenario())


def test_the_spool_of_a_run_that_lives_is_left_alone(state_dir, own):
    async def scenario():
        other = state_dir / "spool" / "other"
        other.mkdir()
        with Writer(other) as writer, Writer(own) as mine:
            writer.fault()
            mine.fault()
            async with serving() as ingest:
                ingest.write_address(state_dir)
                async with running(own, state_dir) as process:
                    await until(lambda: ingest.seqs(mine.incarnation))
                    await stop(process)
                assert not ingest.seqs(writer.incarnation)
                assert not (other / spool.SIDECAR_LOCK).exists()

    asyncio.run(scenario())


def test_one_sidecar_per_spool(state_dir, own):
    async def scenario():
        async with running(own, state_dir):
            await until(lambda: spool.is_locked(own / spool.SIDECAR_LOCK))
            second = await asyncio.create_subprocess_exec(
                *command(own, state_dir), stderr=asyncio.subprocess.PIPE
            )
            _, said = await asyncio.wait_for(second.communicate(), 30)
            assert second.returncode == 2
            assert b"another sidecar ships" in said

    asyncio.run(scenario())


def test_it_ends_by_itself_when_its_parent_was_killed(state_dir, own):
    start = f"""
import subprocess, sys, os, time
arguments = {command(own, state_dir)!r} + ["--parent", str(os.getpid())]
print(subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(600)
"""

    async def scenario():
        parent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", start, stdout=asyncio.subprocess.PIPE
        )
        pid = int(await parent.stdout.readline())
        await until(lambda: spool.is_locked(own / spool.SIDECAR_LOCK))
        parent.kill()
        await parent.wait()
        await until(lambda: not spool.is_locked(own / spool.SIDECAR_LOCK))
        await until(lambda: not os.path.exists(f"/proc/{pid}"))  # noqa: PTH110

    asyncio.run(scenario())


def test_it_goes_on_without_a_spool_that_was_deleted_under_it(state_dir, own):
    async def scenario():
        async with serving() as ingest:
            ingest.write_address(state_dir)
            async with running(own, state_dir) as process:
                await until(lambda: ingest.streams)
                for path in own.iterdir():
                    path.unlink()
                own.rmdir()
                assert await stop(process) == 0

    asyncio.run(scenario())


def test_a_full_disk_stops_nothing(state_dir, tmp_path):
    """A real full file system: a tmpfs of a few pages."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")

    async def scenario():
        with Writer(full) as writer:
            writer.fault()
            (full / "ballast").write_bytes(b"")
            with contextlib.suppress(OSError), (full / "ballast").open("ab", buffering=0) as ballast:
                while ballast.write(b"x" * 1024):
                    pass
            async with serving() as ingest:
                ingest.write_address(state_dir)
                async with running(full, state_dir, "--job", "job") as process:
                    await until(lambda: ingest.seqs(writer.incarnation))
                    (full / "ballast").unlink()
                    writer.fault()
                    await until(lambda: 1 in ingest.seqs(writer.incarnation))
                    await stop(process)
            assert cursor.load(full)[writer.name].offset > 0

    try:
        asyncio.run(scenario())
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_another_collector_at_the_port_of_a_killed_one_gets_nothing(tmp_path):
    """What is meant for the first waits until it is back, wherever that is then."""
    state_dir, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    own = state_dir / "spool" / "mine"
    own.mkdir(parents=True)

    async def kinds(info) -> list[str]:
        async with http(info) as client:
            answer = await client.get("/api/v1/jobs/job/events")
        return [event["kind"] for event in answer.json()] if answer.is_success else []

    async def scenario():
        with Writer(own) as writer:
            async with running(own, state_dir) as process:
                async with collecting(config(tmp_path)) as first:
                    who = {"incarnation": writer.incarnation, "job": "job", "attempt_key": "k", "rank": 0}
                    writer.append("hello", who | {"world_size": 1, "node": "n", "pid": 1, "device": "cpu"})
                    await arrived(lambda: kinds(first), ["hello"])
                    left = (state_dir / "collector.json").read_text()
                # As one that is killed leaves it.
                (state_dir / "collector.json").write_text(left)
                async with collecting(config(tmp_path, state_dir=elsewhere, grpc=first.grpc)) as other:
                    writer.fault()
                    while b"another collector" not in await asyncio.wait_for(process.stderr.readline(), 30):
                        pass
                    async with http(other) as client:
                        assert (await client.get("/api/v1/jobs")).json() == []
                    async with collecting(config(tmp_path)) as back:
                        assert (back.id, back.grpc != first.grpc) == (first.id, True)
                        await arrived(lambda: kinds(back), ["hello", "fault"])
                    assert await kinds(other) == []

    asyncio.run(scenario())


async def arrived(ask, wanted) -> None:
    for _ in range(300):
        if await ask() == wanted:
            return
        await asyncio.sleep(0.1)
    assert await ask() == wanted
