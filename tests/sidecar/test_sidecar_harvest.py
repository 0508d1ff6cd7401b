"""One spool, without a network: what is collected, and what is remembered."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gradwatch.agent.probe import spool
from gradwatch.agent.sidecar import cursor, harvest
from tests.sidecar.journals import Writer

MUCH = 1 << 30


def seqs(parts) -> list[int]:
    return [record.seq for part in parts if part.batch is not None for record in part.batch.records]


def drain(collected: harvest.Harvest, now: float = 0.0) -> list[harvest.Part]:
    """Collect and acknowledge until nothing is left."""
    everything = []
    while parts := collected.collect(now, MUCH):
        collected.commit(parts, now)
        everything += parts
    return everything


def test_records_are_collected_once_they_are_acknowledged(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        collected = harvest.Harvest(tmp_path)
        first = collected.collect(0.0, MUCH)
        # not acknowledged: the same again
        again = collected.collect(0.0, MUCH)
        assert seqs(first) == seqs(again) == [0]
        collected.commit(again, 0.0)
        writer.fault()
        assert seqs(collected.collect(0.0, MUCH)) == [1]


def test_a_new_sidecar_goes_on_where_the_last_one_stopped(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        drain(harvest.Harvest(tmp_path))
        writer.fault()
        assert seqs(drain(harvest.Harvest(tmp_path))) == [1]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"journals": {"x": {}}}', b'{"journals": 3}', b"\x00" * 64])
def test_damaged_cursors_cost_duplicates_and_no_event(tmp_path, damage):
    with Writer(tmp_path) as writer:
        writer.fault()
        drain(harvest.Harvest(tmp_path))
        (tmp_path / cursor.FILENAME).write_bytes(damage)
        assert seqs(drain(harvest.Harvest(tmp_path))) == [0]


def test_shipped_segments_are_deleted_and_the_newest_stays(tmp_path):
    with Writer(tmp_path, segment_bytes=200) as writer:
        for _ in range(20):
            writer.fault()
        before = len(list(tmp_path.glob("*.jsonl")))
        assert seqs(drain(harvest.Harvest(tmp_path))) == list(range(20))
        left = list(tmp_path.glob("*.jsonl"))
        assert before > 3
        assert len(left) == 1


def test_a_full_journal_takes_records_again_once_it_was_shipped(tmp_path):
    with Writer(tmp_path, segment_bytes=200, total_bytes=1000) as writer:
        while writer.fault():
            pass
        drain(harvest.Harvest(tmp_path))
        assert writer.fault()


def test_progress_goes_with_the_last_record_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(harvest, "JOURNAL_BYTES", 100)
    with Writer(tmp_path) as writer:
        for _ in range(5):
            writer.fault()
        writer.progress(3)
        collected = harvest.Harvest(tmp_path)
        while True:
            parts = collected.collect(0.0, MUCH)
            assert len(parts) == 1
            if not collected.behind:
                break
            assert parts[0].progress is None
            collected.commit(parts, 0.0)
        assert parts[0].progress is not None
        assert seqs(parts)[-1] == 4


def test_malformed_lines_are_counted_across_restarts(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        path = tmp_path / spool.Segment(writer.name, "", 0).filename
        with path.open("ab") as file:
            file.write(b"rubbish\n")
        writer.fault()
        writer.progress(1)
        (part,) = drain(harvest.Harvest(tmp_path))
        assert part.progress is not None
        assert part.progress.malformed_lines == 1
        with path.open("ab") as file:
            file.write(b"more\n")
        (part,) = drain(harvest.Harvest(tmp_path))
        assert part.progress is not None
        assert part.progress.malformed_lines == 2


def test_unknown_enums_are_counted_as_dropped_values(tmp_path):
    with Writer(tmp_path) as writer:
        writer.append("nonfinite", {"gradients": [{"parameter": "w", "value": "VALUE_X"}]})
        writer.progress(1)
        (part,) = drain(harvest.Harvest(tmp_path))
        assert part.progress is not None
        assert dict(part.progress.dropped) == {"unknown_enum": 1}


def test_a_killed_process_is_reported_as_ended_once(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        writer.progress(4)
        collected = harvest.Harvest(tmp_path)
        drain(collected)
        assert not collected.all_closed()
        writer.kill()
        (part,) = drain(collected)
        assert part.progress is not None
        assert (part.progress.ended, part.progress.round) == (True, 4)
        assert collected.all_closed()
        assert collected.remainder().nothing


def test_a_process_that_died_before_its_first_round_ended_too(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        writer.kill()
        (part,) = drain(harvest.Harvest(tmp_path))
        assert part.progress is not None
        assert part.progress.ended
        assert part.progress.incarnation == writer.incarnation


def test_what_remains_is_measured(tmp_path):
    with Writer(tmp_path) as writer:
        writer.fault()
        collected = harvest.Harvest(tmp_path)
        remainder = collected.remainder()
        assert remainder.journals == 1
        assert remainder.unread_bytes > 20
        drain(collected)
        assert collected.remainder().nothing


def test_one_flooding_rank_does_not_starve_the_others(tmp_path):
    with Writer(tmp_path, rank=0) as loud, Writer(tmp_path, rank=1) as quiet:
        for _ in range(50):
            loud.fault("x" * 2000)
        quiet.fault()
        collected = harvest.Harvest(tmp_path)
        seen = set()
        for _ in range(3):
            seen |= {part.name for part in collected.collect(0.0, 1)}
        assert seen == {loud.name, quiet.name}


def test_an_unreadable_journal_holds_up_nobody(tmp_path, caplog):
    with Writer(tmp_path, rank=0) as bad, Writer(tmp_path, rank=1) as good:
        good.fault()
        bad.fault()
        # Even root cannot read a folder as a file.
        path = tmp_path / spool.Segment(bad.name, "", 0).filename
        path.rename(tmp_path / "aside")
        path.mkdir()
        collected = harvest.Harvest(tmp_path)
        parts = collected.collect(0.0, MUCH)
        assert [part.name for part in parts if part.batch] == [good.name]
        collected.commit(parts, 0.0)
        collected.collect(0.0, MUCH)
        assert sum(bad.name in message for message in caplog.messages) == 1
        assert not collected.all_closed()
        path.rmdir()
        (tmp_path / "aside").rename(path)
        assert seqs(drain(collected)) == [0]


def test_a_spool_that_vanished_is_said_so(tmp_path):
    collected = harvest.Harvest(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        collected.collect(0.0, MUCH)
    assert collected.remainder().nothing


_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from gradwatch.agent.sidecar import harvest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
collected = harvest.Harvest(Path(sys.argv[1]))
parts = collected.collect(0.0, 1 << 30)
collected.commit(parts, 0.0)
again = collected.collect(0.0, 1 << 30)
assert [part.batch for part in parts if part.batch] and not [part.batch for part in again if part.batch]
"""


def test_cursors_that_cannot_be_written_stop_nothing(tmp_path):
    with Writer(tmp_path, segment_bytes=200) as writer:
        for _ in range(10):
            writer.fault()
        subprocess.run([sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)], check=True)
        # Shipped segments are gone nevertheless: that is what frees a full disk.
        assert len(list(tmp_path.glob("*.jsonl"))) == 1
        assert not (tmp_path / cursor.FILENAME).exists()
        assert not list(tmp_path.glob(".*.new"))
        # A sidecar that comes later finds its way from what is left.
        assert set(seqs(drain(harvest.Harvest(tmp_path)))) <= set(range(10))


def test_cursors_are_replaced_in_one_step(tmp_path):
    cursor.save(tmp_path, {"a": cursor.Cursor(1, 2, 3, 4, closed=True)})
    assert cursor.load(tmp_path) == {"a": cursor.Cursor(1, 2, 3, 4, closed=True)}
    assert [path.name for path in tmp_path.iterdir()] == [cursor.FILENAME]
    assert json.loads((tmp_path / cursor.FILENAME).read_bytes())["journals"]["a"]["offset"] == 2
