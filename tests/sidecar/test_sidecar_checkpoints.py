"""A sidecar that delivers orders and looks after checkpoints: real processes, real files, a real service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil

import pytest
import torch
from google.protobuf import json_format

from gradwatch.agent.checkpoints.listing import QUARANTINE
from gradwatch.agent.checkpoints.result import Completeness
from gradwatch.agent.checkpoints.survey import Seen
from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cleanup
from gradwatch.agent.sidecar.checkpoint_memory import Known, due_now, due_while_watching, learned
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.checkpoints import files
from tests.s3 import s3_bucket
from tests.sidecar.ingest import serving, until
from tests.sidecar.journals import Writer
from tests.sidecar.test_sidecar_process import running, stop

WATCH = pb.Task(job="job", kind=pb.TASK_KIND_WATCH)
SCAN = pb.Task(id="d1", job="job", kind=pb.TASK_KIND_SCAN)
LONG = 60.0


@pytest.fixture
def root(tmp_path):
    return tmp_path / "ckpts"


class Case:
    """A sidecar's surroundings: its spool, with the journal of a launch, and a service."""

    def __init__(self, tmp_path, root, ingest, launch):
        self.state_dir = tmp_path
        self.own = tmp_path / "spool" / "mine"
        self.root = root
        self.ingest = ingest
        self.launch = launch

    @contextlib.asynccontextmanager
    async def sidecar(self):
        seen = len(self.ingest.hellos)
        options = ("--job", "job", "--checkpoints-root", self.root)
        async with running(self.own, self.state_dir, *options) as process:
            await until(lambda: len(self.ingest.hellos) > seen)
            yield process

    def scanned(self, name):
        path = str(self.root / name)
        return [body for body in self.ingest.bodies("checkpoint_scanned") if body.path == path]

    def done(self, task):
        return [
            body for body in self.ingest.bodies("task_done") if (body.id, body.kind) == (task.id, task.kind)
        ]

    async def ask(self, task):
        """Push a task and wait for its answer."""
        before = len(self.done(task))
        await self.ingest.push(task=task)
        await until(lambda: len(self.done(task)) > before, LONG)
        return self.done(task)[-1]


@contextlib.asynccontextmanager
async def case(tmp_path, root):
    (tmp_path / "spool" / "mine").mkdir(parents=True)
    with Writer(tmp_path / "spool" / "mine", None) as launch:
        started = {"job": "job", "generation": 3, "launch": launch.incarnation, "node": "here", "pid": 1}
        launch.append("launch_started", started)
        async with serving() as ingest:
            ingest.write_address(tmp_path)
            yield Case(tmp_path, root, ingest, launch)


def checkpoint(root, name, step=5, *, nan=False):
    root.mkdir(exist_ok=True)
    network, optimizer = files.trained(step)
    if nan:
        files.plant(network[0].weight, count=3)
    return files.save(root / name, network, optimizer, global_step=step)


def test_orders_for_its_own_launches_are_left_in_the_spool(tmp_path, root):
    async def scenario():
        async with case(tmp_path, root) as it, it.sidecar() as process:
            assert list(it.ingest.hellos[0].launches) == [it.launch.incarnation]
            order = pb.Order(
                id="d1", job="job", generation=4, action=pb.ACTION_STOP, reason="why", resume_step=0
            )
            order.launch = "another"
            await it.ingest.push(order=order)
            order.launch = it.launch.incarnation
            await it.ingest.push(order=order)
            await until((it.own / spool.ORDER).exists)
            text = (it.own / spool.ORDER).read_text()
            assert json_format.Parse(text, pb.Order()) == order
            assert json.loads(text)["resume_step"] == "0", "names as in the schema"
            order.action = pb.ACTION_START
            await it.ingest.push(order=order)
            await until(lambda: json.loads((it.own / spool.ORDER).read_text())["action"] == "ACTION_START")
            assert await stop(process) == 0

    asyncio.run(scenario())


def test_a_root_on_object_storage_is_looked_after_alike_and_nothing_is_moved_there(tmp_path, monkeypatch):
    async def scenario(bucket):
        url = f"{bucket.url}/run"
        async with case(tmp_path, url) as it, it.sidecar():
            await until(lambda: it.ingest.bodies("checkpoint_root"))
            root = it.ingest.bodies("checkpoint_root")[0]
            assert (root.root, root.error) == (url, "")
            for step, nan in ((5, False), (6, True)):
                bucket.put(
                    checkpoint(tmp_path / "local", f"step_{step}.pt", step, nan=nan), f"run/step_{step}.pt"
                )
            await it.ask(SCAN)
            found = {body.path: body.finite for body in it.ingest.bodies("checkpoint_scanned")}
            assert found == {f"{url}/step_5.pt": True, f"{url}/step_6.pt": False}
            aside = pb.Task(
                id="d2", job="job", kind=pb.TASK_KIND_QUARANTINE, paths=[f"{url}/step_6.pt"], reason="why"
            )
            assert "marked, and never moved" in (await it.ask(aside)).error
            bucket.system.rm(f"{url}/step_6.pt")
            await it.ask(pb.Task(id="d3", job="job", kind=pb.TASK_KIND_SCAN))
            assert [body.path for body in it.ingest.bodies("checkpoint_gone")] == [f"{url}/step_6.pt"]

    with s3_bucket(tmp_path / "s3.log") as bucket:
        for name, value in bucket.environ.items():
            monkeypatch.setenv(name, value)
        asyncio.run(scenario(bucket))


def test_while_watching_it_tells_what_comes_changes_and_goes(tmp_path, root):
    async def scenario():
        async with case(tmp_path, root) as it, it.sidecar() as process:
            roots = lambda: it.ingest.bodies("checkpoint_root")  # noqa: E731
            await until(roots)
            first = roots()[0]
            assert (first.job, first.generation, first.launch) == ("job", 3, it.launch.incarnation)
            assert (first.root, "No such file" in first.error) == (str(root), True)
            root.mkdir()
            await until(lambda: not roots()[-1].error)
            checkpoint(root, "step_5.pt")
            assert not it.scanned("step_5.pt"), "nobody has asked"
            await it.ingest.push(task=WATCH)
            checkpoint(root, "step_6.pt", 6, nan=True)
            (root / "step_7.pt").write_bytes((root / "step_5.pt").read_bytes()[:-500])
            files.age(root / "step_7.pt")
            (root / "last.ckpt").symlink_to("step_5.pt")
            await until(lambda: all(it.scanned(f"step_{step}.pt") for step in (5, 6, 7)), LONG)
            good, bad, torn = (it.scanned(f"step_{step}.pt")[0] for step in (5, 6, 7))
            assert good.completeness == pb.COMPLETENESS_COMPLETE
            assert (good.finite, good.error, good.found) == (True, "", "")
            assert good.modified_at == pytest.approx((root / "step_5.pt").stat().st_mtime)
            assert pb.CheckpointStep(source="checkpoint", step=5) in good.steps
            assert (bad.finite, bad.found) == (False, "model.0.weight holds 3 NaN")
            assert (torn.completeness, torn.HasField("finite")) == (pb.COMPLETENESS_TORN, False)
            checkpoint(root, "step_5.pt", 8, nan=True)
            (root / "step_6.pt").unlink()
            await until(lambda: len(it.scanned("step_5.pt")) >= 3, LONG)
            _, again, newest = it.scanned("step_5.pt")
            assert (again.completeness, again.HasField("finite")) == (pb.COMPLETENESS_IN_FLIGHT, False)
            assert newest.finite is False
            await until(lambda: it.ingest.bodies("checkpoint_gone"))
            assert [body.path for body in it.ingest.bodies("checkpoint_gone")] == [str(root / "step_6.pt")]
            assert not it.scanned("last.ckpt")
            assert await stop(process) == 0
            assert json.loads((it.own / cleanup.DRAINED).read_bytes())["complete"], "its own journal too"

    asyncio.run(scenario())


def test_a_scan_reads_what_has_changed_and_nothing_else_even_after_a_restart(tmp_path, root):
    async def scenario():
        path = checkpoint(root, "step_5.pt")
        async with case(tmp_path, root) as it:
            async with it.sidecar() as process:
                assert not (await it.ask(SCAN)).error
                assert [body.finite for body in it.scanned("step_5.pt")] == [True]
                assert not (await it.ask(SCAN)).error
                assert len(it.scanned("step_5.pt")) == 1
                process.kill()
                await process.wait()
            # Poisoned, in a way that no look at names, sizes and times can notice: were it read again,
            # it would not be finite.
            poison(path)
            async with it.sidecar() as process:
                assert not (await it.ask(SCAN)).error
                assert [body.finite for body in it.scanned("step_5.pt")] == [True, True]
                path.touch()
                checkpoint(root, "step_6.pt", 6)
                await it.ask(SCAN)
                assert it.scanned("step_5.pt")[-1].finite is False
                assert it.scanned("step_6.pt")[-1].finite is True
                await stop(process)
            (cache,) = (tmp_path / "checkpoints").iterdir()
            cache.write_text("{ broken")
            async with it.sidecar() as process:
                before = len(it.scanned("step_5.pt"))
                await it.ask(SCAN)
                assert [body.finite for body in it.scanned("step_5.pt")][before:] == [False]
                shutil.rmtree(root)
                assert "No such file" in (await it.ask(SCAN)).error
                await stop(process)

    asyncio.run(scenario())


def poison(path):
    """Overwrite the values of a checkpoint and leave its size and time as they were."""
    status = path.stat()
    state = torch.load(path, weights_only=True)
    state["model"]["0.weight"].fill_(files.NAN)
    torch.save(state, path)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_quarantine_is_performed_once_and_answered_each_time(tmp_path, root):
    async def scenario():
        for step in (5, 6, 7):
            checkpoint(root, f"step_{step}.pt", step)
        task = pb.Task(id="d1", job="job", kind=pb.TASK_KIND_QUARANTINE, reason="poisoned")
        task.paths.extend(str(root / f"step_{step}.pt") for step in (6, 7, 8))
        moved = [str(root / "step_6.pt"), str(root / "step_7.pt")]
        async with case(tmp_path, root) as it:
            async with it.sidecar() as process:
                await it.ask(SCAN)
                outside = pb.Task(id="d0", job="job", kind=pb.TASK_KIND_QUARANTINE, paths=["/etc/passwd"])
                assert "not below the root" in (await it.ask(outside)).error
                (root / "away").symlink_to("/etc")
                outside = pb.Task(
                    id="d00", kind=pb.TASK_KIND_QUARANTINE, paths=[str(root / "away" / "passwd")]
                )
                assert "symbolic link" in (await it.ask(outside)).error
                for _ in range(2):
                    done = await it.ask(task)
                    assert (done.error, list(done.paths)) == ("", moved)
                process.kill()
                await process.wait()
            async with it.sidecar() as process:
                done = await it.ask(task)
                assert (done.error, list(done.paths)) == ("", moved)
                await it.ask(pb.Task(id="d2", kind=pb.TASK_KIND_SCAN))
                await stop(process)
            assert not it.ingest.bodies("checkpoint_gone")
        assert sorted(path.name for path in root.glob("step*")) == ["step_5.pt"]
        assert sorted(path.name for path in (root / QUARANTINE / "d1").glob("step*")) == [
            "step_6.pt",
            "step_7.pt",
        ]

    asyncio.run(scenario())


# ---------------------------------------------------------------- what is due


def seen(path="a", fingerprint="1", at=100.0):
    return Seen(path, fingerprint, at)


def test_what_has_changed_is_due_once_it_holds_still_and_the_newest_first():
    looks = [seen("old", at=1.0), seen("new", at=2.0), seen("growing", "2", at=3.0), seen("done", at=4.0)]
    before = {"old": "1", "new": "1", "growing": "1", "done": "1"}
    known = {"done": Known("1", {})}
    assert [one.path for one in due_while_watching(looks, before, known, 10.0)] == ["new", "old"]
    assert [one.path for one in due_now(looks, known)] == ["growing", "new", "old"]


def test_a_save_in_flight_is_looked_at_again_once_it_should_have_ended():
    known = {"a": learned(seen(), Completeness.IN_FLIGHT, {}, None, now=110.0)}
    for now, due in ((111.0, False), (160.0, False), (162.0, True)):
        assert bool(due_while_watching([seen()], {"a": "1"}, known, now)) is due
    assert not due_now([seen()], known), "nothing has changed since"


def test_a_scan_that_failed_is_tried_again_less_and_less_often():
    first = learned(seen(), None, {}, None, now=0.0)
    second = learned(seen(), None, {}, first, now=0.0)
    assert (first.again_at, second.again_at) == (60.0, 120.0)
    assert learned(seen(fingerprint="2"), None, {}, second, now=0.0).again_at == 60.0, "it is another one"
    assert due_now([seen()], {"a": second})
    assert learned(seen(), Completeness.TORN, {}, second, now=0.0).again_at is None
