"""How ranks went, in a bounded number of columns."""

from __future__ import annotations

import json

import hypothesis.strategies as st
from hypothesis import given

from gradwatch.collector.picture.timeline import (
    MAX_COLUMNS,
    MAX_SEGMENTS,
    Cell,
    Reached,
    Timeline,
    as_json,
    from_json,
    known_magnitude,
    quantised,
)

FIRST = (0, 0)


def reach(timeline, rank, step, *, bad=0, rounds=None, magnitude=None, ended=False, attempt=FIRST):
    reached = Reached(step, step + 1 if rounds is None else rounds, bad, ended)
    timeline.reach(attempt, rank, f"n{rank}", reached, magnitude=magnitude, now=1.0)


def cells(timeline, row=0, segment=0):
    return [Cell(cell) for cell in timeline.segments[segment].rows[row].cells]


def test_steps_on_the_way_are_clean_and_what_is_said_of_one_stays():
    timeline = Timeline()
    reach(timeline, 0, 1)
    timeline.mark(FIRST, 0, "n0", step=3, cell=Cell.BAD, now=1.0)
    reach(timeline, 0, 5, bad=1)
    assert cells(timeline) == [Cell.CLEAN, Cell.CLEAN, Cell.BAD, Cell.CLEAN, Cell.CLEAN]
    assert timeline.segments[0].first_step == 1


def test_what_comes_late_is_put_where_it_was():
    timeline = Timeline()
    reach(timeline, 0, 40)
    timeline.mark(FIRST, 1, "n1", step=20, cell=Cell.BAD, now=1.0)
    segment = timeline.segments[0]
    assert segment.first_step == 20
    assert cells(timeline, row=1)[0] is Cell.BAD
    assert cells(timeline, row=0)[20] is Cell.CLEAN
    assert set(cells(timeline, row=0)[:20]) == {Cell.UNKNOWN}


def test_bad_rounds_that_are_only_counted_are_bad_all_the_same():
    timeline = Timeline()
    reach(timeline, 0, 0, rounds=1)
    reach(timeline, 0, 10, bad=10, rounds=11)
    assert cells(timeline)[1:] == [Cell.BAD] * 10


def test_columns_are_merged_and_keep_the_worst_and_the_largest():
    timeline = Timeline()
    for step in range(1000):
        reach(timeline, 0, step, magnitude=1e3 if step == 500 else 1.0)
    timeline.mark(FIRST, 0, "n0", step=777, cell=Cell.BAD, now=1.0)
    segment = timeline.segments[0]
    assert timeline.stride == 8
    assert timeline.columns(segment) == 125 <= MAX_COLUMNS
    assert cells(timeline)[777 // 8] is Cell.BAD
    assert [at for at, cell in enumerate(cells(timeline)) if cell is not Cell.CLEAN] == [777 // 8]
    magnitudes = [known_magnitude(one) for one in segment.rows[0].magnitudes]
    assert magnitudes[500 // 8] == 3.0
    assert {one for at, one in enumerate(magnitudes) if at != 500 // 8} == {0.0}


def test_a_rollback_is_a_segment_of_its_own():
    timeline = Timeline()
    reach(timeline, 0, 30)
    reach(timeline, 0, 10, attempt=(1, 0))
    reach(timeline, 0, 20, attempt=(1, 0))
    # What the first attempt still had to say comes late.
    reach(timeline, 0, 31, attempt=FIRST)
    spans = [(one.generation, one.first_step, one.last_step) for one in timeline.segments]
    assert spans == [(0, 30, 31), (1, 10, 20)]


def test_a_row_of_several_ranks_shows_the_worst_and_ends_with_the_last():
    timeline = Timeline(ranks_per_row=2)
    for rank in range(4):
        reach(timeline, rank, 3, ended=rank != 3)
    timeline.mark(FIRST, 1, "n1", step=2, cell=Cell.BAD, now=1.0)
    segment = timeline.segments[0]
    assert sorted(segment.rows) == [0, 1]
    assert max(cells(timeline, row=0)) is Cell.BAD
    assert timeline.has_ended(segment, 0)
    assert not timeline.has_ended(segment, 1)


words = st.tuples(
    st.integers(0, 3),  # generation
    st.integers(0, 2),  # rank
    st.integers(0, 5000),  # step
    st.booleans(),  # whether it is a mark
    st.one_of(st.none(), st.floats(min_value=0, allow_nan=False, allow_infinity=False)),
)


@given(st.lists(words, max_size=60))
def test_whatever_is_said_in_whatever_order_it_stays_bounded_and_is_kept_as_it_is(said):
    timeline, marked = Timeline(), set()
    for generation, rank, step, is_mark, magnitude in said:
        if is_mark:
            timeline.mark((generation, 0), rank, "n", step=step, cell=Cell.BAD, now=1.0)
            marked.add((generation, rank, step))
        else:
            reach(timeline, rank, step, magnitude=magnitude, attempt=(generation, 0))
    assert sum(map(timeline.columns, timeline.segments)) <= MAX_COLUMNS
    assert len(timeline.segments) <= MAX_SEGMENTS
    again = from_json(json.loads(json.dumps(as_json(timeline))))
    assert as_json(again) == as_json(timeline)
    for generation, rank, step in marked:
        segment = timeline.segment(generation, 0)
        assert segment.rows[rank].cells[timeline.column(segment, step)] is int(Cell.BAD)


def test_magnitudes_are_logarithms():
    assert known_magnitude(quantised(1000.0)) == 3.0
    assert known_magnitude(quantised(0.0)) == -300.0
    assert known_magnitude(quantised(1e308)) == 300.0
