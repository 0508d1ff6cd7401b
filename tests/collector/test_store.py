"""What is remembered, in real SQLite files."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from gradwatch.collector import observations as obs
from gradwatch.collector import tables
from gradwatch.collector.errors import StoreError
from gradwatch.collector.fold import fold
from gradwatch.collector.model import FoldConfig, State, apply
from gradwatch.collector.store import Store
from tests.collector.history import (
    NOW,
    batch,
    hello,
    launch_ended,
    launch_started,
    nonfinite,
    progress,
    report,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "collector.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{path}", busy_seconds=0.1)
    store.migrate()
    yield store
    store.close()


def keep(store: Store, state: State, *parts: obs.Batch | obs.Progress) -> State:
    changes = fold(state, report(*parts), FoldConfig(), NOW)
    store.commit(changes)
    return apply(state, changes)


def everything(store: Store) -> State:
    """A bit of all there is to remember."""
    unwatched = obs.Unwatched("j", 0, "n0", 5, None, None, "FSDP1")
    state = keep(store, State(), batch("l", 0, launch_started()), batch("x", 4, nonfinite(1)))
    state = keep(store, state, batch("r0", 0, hello(0)), batch("r1", 0, hello(1)), batch("u", 0, unwatched))
    state = keep(store, state, batch("dup", 0, hello(0)))
    model = obs.ModelSeen(0, "Net", "DDP", 2, 1, (obs.Parameter("a", "", "Net", (2, 3), "f32"),))
    state = keep(store, state, batch("r0", 1, model, obs.Fault("scan", "boom"), obs.CheckpointSeen("/c", 3)))
    state = keep(store, state, batch("r0", 4, nonfinite(5, phase=obs.Phase.LOSS), nonfinite(30)))
    state = keep(store, state, progress("r0", 31, 6, bad_rounds=2, last_bad_round=30))
    state = keep(store, state, progress("r1", 12, 1, dropped={"device_behind": 1}))
    return keep(store, state, batch("l", 1, launch_ended(exit_code=3)))


def test_all_is_read_back(store: Store, path: Path):
    state = everything(store)
    assert len(state.incidents) == 2
    # Names of parameters are told again by the next attempt.
    assert store.load() == replace(state, parameters={})
    store.close()
    again = Store.in_file(path)
    again.migrate()
    assert again.load() == replace(state, parameters={})
    again.close()


def test_what_goes_on_after_a_restart_is_as_if_there_was_none(store: Store):
    state = everything(store)
    parts = (batch("r1", 1, nonfinite(13)), progress("r1", 31, 2, bad_rounds=1))
    assert fold(store.load(), report(*parts), FoldConfig(), NOW) == fold(
        state, report(*parts), FoldConfig(), NOW
    )


def test_accepted_records_are_logged_in_the_order_of_their_arrival(store: Store):
    everything(store)
    events = store.events("j")
    # Not the record of the unknown journal, and not the refused hello.
    assert [(event["incarnation"], event["seq"]) for event in events if event["kind"] != "progress"] == [
        ("l", 0),
        ("r0", 0),
        ("r1", 0),
        ("u", 0),
        *(("r0", seq) for seq in range(1, 6)),
        ("l", 1),
    ]
    bad = next(event for event in events if event["kind"] == "nonfinite")
    assert (bad["rank"], bad["attempt"], bad["body"]["round"], bad["body"]["phase"]) == (0, 0, 5, "loss")
    assert [event["id"] for event in store.events("j", after=events[1]["id"], limit=2)] == [3, 4]
    assert store.events("other") == []


def test_a_record_that_the_log_has_holds_up_nothing(store: Store):
    changes = fold(State(), report(batch("r0", 0, hello(0))), FoldConfig(), NOW)
    store.commit(changes)
    more = fold(State(), report(batch("r1", 0, hello(1))), FoldConfig(), NOW)
    store.commit(replace(more, events=changes.events + more.events))
    assert [event["incarnation"] for event in store.events("j")] == ["r0", "r1"]


def test_with_a_bad_round_it_is_logged_how_far_ranks_had_come(store: Store):
    everything(store)
    told = [event for event in store.events("j") if event["kind"] == "progress"]
    assert {event["rank"] for event in told} == {0, 1}
    # Numbers of their own, that no record has.
    assert [event["seq"] for event in told] == [-1 - place for place in range(len(told))]
    assert told[-1]["body"]["round"] == 12


def test_each_commit_is_on_the_disk(store: Store):
    with store._connected().begin():
        assert store._connected().exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert store._connected().exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_a_full_disk_stores_nothing_and_is_got_over(store: Store):
    state = keep(store, State(), batch("r0", 0, hello(0, 1)))
    with store._connected().begin():
        pages = store._connected().exec_driver_sql("PRAGMA page_count").scalar()
        store._connected().exec_driver_sql(f"PRAGMA max_page_count={pages}")
    big = obs.CheckpointSeen("/c" * 10_000, 1)
    with pytest.raises(StoreError, match="disk is full"):
        keep(store, state, batch("r0", 1, nonfinite(5), big))
    # Only the limit of that connection stood in the way.
    assert store.load() == state
    state = keep(store, state, batch("r0", 1, nonfinite(5), big))
    assert store.load() == state
    assert len(store.events("j")) == 3


def test_a_locked_database_stores_nothing_and_is_got_over(store: Store, path: Path):
    state = keep(store, State(), batch("r0", 0, hello(0, 1)))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        keep(store, state, batch("r0", 1, nonfinite(5)))
    other.execute("ROLLBACK")
    other.close()
    assert store.load() == state
    keep(store, state, batch("r0", 1, nonfinite(5)))
    assert len(store.events("j")) == 2


def test_what_is_no_database_is_said(path: Path):
    path.write_text("no database at all" * 100)
    store = Store.in_file(path)
    with pytest.raises(StoreError, match=r"cannot set up the store .*collector\.db"):
        store.migrate()
    store.close()


def test_tables_of_another_version_are_noticed(path: Path):
    store = Store.in_file(path)
    assert not store.is_current()
    store.migrate()
    assert store.is_current()
    store.close()


def test_the_newest_migration_leaves_the_tables_that_the_code_uses(store: Store):
    with store._connected().begin():
        found = sa.inspect(store._connected())
        for table in tables.metadata.sorted_tables:
            columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
            assert columns == {column.name: column.nullable for column in table.columns}
