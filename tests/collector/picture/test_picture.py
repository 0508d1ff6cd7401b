"""A job as it is drawn, from what its ranks reported, over HTTP and across a restart of the collector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.app import running
from gradwatch.collector.picture.gallery import Gallery
from gradwatch.collector.picture.picture import picture
from gradwatch.collector.policy.dossier import Checkpoint, Dossier
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import batch as pb_batch
from tests.collector.client import hello as pb_hello
from tests.collector.client import nonfinite as pb_nonfinite
from tests.collector.client import progress as pb_progress
from tests.collector.client import sidecar
from tests.collector.history import NOW, Told, batch, hello, nonfinite, progress
from tests.collector.running import config, http, run

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.collector.model import Changes


class Seen(Told):
    """A told state that is drawn as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.gallery = Gallery()

    def _keep(self, changes: Changes) -> None:
        super()._keep(changes)
        self.gallery.see(self.state, changes, self.now)

    def drawn(self, dossier: Dossier | None = None):
        return picture(self.state, self.job, dossier or Dossier("j"), self.gallery.timelines["j"])


def test_ranks_by_steps_and_what_happened_on_the_same_axis():
    told = Seen()
    told.hellos(2)
    told.tell(progress("r0", 1, 1, magnitude=0.5), progress("r1", 1, 1, magnitude=0.25))
    told.tell(
        batch("r1", 1, nonfinite(5)),
        progress("r0", 8, 1, last_bad_round=5, magnitude=100.0),
        progress("r1", 8, 2, last_bad_round=5, bad_rounds=1, ended=True),
    )
    drawn = told.drawn()
    assert [(one.first_step, one.last_step, one.first_column, one.columns) for one in drawn.segments] == [
        (1, 8, 0, 8)
    ]
    assert [(row.rank, row.last_rank, row.node, row.states) for row in drawn.ranks] == [
        (0, 0, "n0", "cccccccc"),
        (1, 1, "n1", "ccccbccc"),
    ]
    assert drawn.ranks[0].magnitudes == [-0.3, *[None] * 6, 2.0]
    (mark,) = drawn.incidents
    assert (mark.id, mark.step, mark.column, mark.first_rank) == (told.incident.id, 5, 4, 1)


def test_after_a_rollback_the_steps_come_again_and_checkpoints_stay_where_they_were_written():
    told = Seen()
    told.hellos(1)
    told.tell(progress("r0", 0, 1)).tell(progress("r0", 20, 1))
    told.now += 100
    told.tell(batch("s0", 0, hello(0, 1, generation=1, attempt_key="k1")))
    told.tell(progress("s0", 1, 1, step=10)).tell(progress("s0", 6, 1, step=15))
    ledger = (
        Checkpoint("/c/10", 10, complete=True, finite=True, seen_at=NOW + 1, modified_at=NOW + 1),
        Checkpoint("/c/12", 12, complete=True, finite=False, seen_at=NOW + 2, quarantined=True),
        Checkpoint("/c/15", 15, complete=True, finite=True, seen_at=NOW + 110, modified_at=NOW + 110),
        Checkpoint("/c/x", None, complete=True, finite=True, seen_at=NOW + 111),
    )
    drawn = told.drawn(Dossier("j", checkpoints=ledger))
    assert [(one.generation, one.first_column, one.columns) for one in drawn.segments] == [
        (0, 0, 21),
        (1, 21, 6),
    ]
    assert drawn.columns == 27
    (row,) = drawn.ranks
    assert row.states == "c" * 27
    assert [(one.path, one.verdict, one.column) for one in drawn.checkpoints] == [
        ("/c/10", "good", 10),
        ("/c/12", "quarantined", 12),
        ("/c/15", "good", 21 + 5),
        ("/c/x", "unknown", None),
    ]


def test_a_rank_that_ended_is_shown_so_for_as_long_as_others_go_on():
    told = Seen()
    told.hellos(2)
    told.tell(progress("r0", 0, 1), progress("r1", 0, 1))
    told.tell(progress("r1", 2, 1, ended=True)).tell(progress("r0", 5, 1))
    assert [row.states for row in told.drawn().ranks] == ["cccccc", "cccxxx"]


def test_it_is_served_and_outlives_the_collector(tmp_path: Path):
    async def scenario() -> None:
        async with running(config(tmp_path)) as info, http(info) as client:
            async with sidecar(info.grpc) as it:
                await it.send(
                    pb.Report(
                        batches=[pb_batch("a", pb_hello("a", 0, 1), pb_nonfinite(1, 5))],
                        progress=[pb_progress("a", 8, 2, bad_rounds=1, magnitude=10.0)],
                    )
                )
            answer = await client.get("/api/v1/jobs/j/picture")
            drawn = answer.json()
            assert drawn["ranks"][0]["states"] == "bccc"
            assert drawn["ranks"][0]["magnitudes"] == [None, None, None, 1.0]
            assert drawn["incidents"][0]["column"] == 0
            etag = {"If-None-Match": answer.headers["etag"]}
            assert (await client.get("/api/v1/jobs/j/picture", headers=etag)).status_code == 304
            assert (await client.get("/api/v1/jobs/nope/picture")).status_code == 404
        async with running(config(tmp_path)) as info, http(info) as client:
            again = (await client.get("/api/v1/jobs/j/picture")).json()
        assert again["ranks"] == drawn["ranks"]
        assert again["segments"] == drawn["segments"]

    run(scenario())
