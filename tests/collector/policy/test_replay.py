"""A recorded history gives the decisions that the live one gave."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collector import document, tables
from gradwatch.collector.model import UnknownReason
from gradwatch.collector.observations import (
    KINDS,
    Body,
    CheckpointSeen,
    GuardOff,
    NonFinite,
    Phase,
    Progress,
    Replay,
    Skipped,
)
from gradwatch.collector.policy.log import Log, read_log
from gradwatch.collector.policy.model import Action
from gradwatch.collector.policy.problems import EventsError
from gradwatch.collector.policy.refusals import Silence
from gradwatch.collector.policy.replay import ASSUMED, NO_PATH, PASSED, SAVED, replay
from tests.collector.bodies import autopsy, flight, reduced
from tests.collector.history import (
    GRADIENT_PHASES,
    NOW,
    hello,
    launch_ended,
    launch_started,
    nonfinite,
    progress,
)
from tests.collector.policy.story import ROLL_BACK, Story, checkpoint, policy
from tests.collector.test_any_order import Course, Journal, courses, essence_of, simulate

if TYPE_CHECKING:
    from random import Random

    from gradwatch.collector import observations as obs
    from gradwatch.collector.model import Incident
    from gradwatch.collector.policy.decision import Decision

RULES = """
    mode: enforce
    guard: {on_nonfinite: skip_step, max_consecutive: 4}
    rules:
      - {name: input, match: {cause: input}, action: ignore}
      - {name: repeats, match: {same_rank: true, count: ">=2", within_steps: 50}, action: rollback}
      - {name: limit, match: {guard_exhausted: true}, action: rollback}
      - {name: burst, match: {consecutive_bad_steps: ">=3"}, action: rollback}
      - {name: rest, match: {}, action: warn}
    checkpoints: {root: /ckpts}
    budgets: [{scope: job, max: 2, per: 1h}, {scope: no_progress, max: 2}]
    cooldown: 1m
"""

# Without checkpoints: the log of a story that has none would be taken to have good ones.
NO_WAY_BACK = policy(RULES.replace("action: rollback", "action: warn", 1).replace("rollback", "halt"))


def lines_of(story: Story) -> list[str]:
    """What `gradwatch events JOB --json` prints."""
    lines = []
    for number, event in enumerate(story.events, start=1):
        row = tables.event_row(event)
        row["body"] = json.loads(row["body"])
        lines.append(document.event({"id": number, **row}).model_dump_json())
    return lines


def log_of(story: Story) -> Log:
    return read_log(lines_of(story), "events.jsonl")


def old_log_of(story: Story) -> Log:
    """As it was while logs did not say how far ranks had come."""
    return read_log([line for line in lines_of(story) if '"kind":"progress"' not in line], "events.jsonl")


def replayed(story: Story) -> list[Decision]:
    rows = replay(log_of(story), story.policy).rows
    return [row.answer.decision for row in rows if row.answer.decision is not None]


def save(story: Story, step: int) -> None:
    """A checkpoint is saved, scanned and found good, and said to be saved in the journal."""
    known = checkpoint(step, seen_at=story.now)
    story.say(0, CheckpointSeen(known.path, step))
    story.saved(known)


def test_every_kind_of_record_is_read_back():
    kinds = set(get_args(Body))
    assert {*kinds, Progress} == set(KINDS.values())
    story = Story(policy("")).start()
    for body in (GuardOff("x"), Skipped(1, 1, 1, 1, exhausted=False), CheckpointSeen("/c", None)):
        story.say(0, body)
    story.bad(3, rank=1, phase=Phase.LOSS)
    for body in (reduced(3), flight(3, [1.0, math.nan, math.inf]), autopsy(1, 3, Replay.REPRODUCED)):
        story.say(1, body)
    log = log_of(story)
    assert {type(one.body) for one in log.events} >= {NonFinite, Progress}
    # A NaN is not equal to itself.
    assert [repr(one.body) for one in log.events] == [repr(one.body) for one in story.events]
    assert [one.received_at for one in log.events] == [one.received_at for one in story.events]


def test_a_rollback_its_checkpoint_and_what_it_moves():
    story = Story(policy(ROLL_BACK)).start()
    save(story, 4)
    story.wait(5)
    save(story, 9)
    story.wait(5).bad(7, rank=1).wait(1)
    assert replayed(story) == list(story.decisions)
    assert story.decision.effect == "resume /ckpts/4, move /ckpts/9"


def test_who_was_first_is_known_before_anything_is_decided():
    # Rank 0's record arrives later than rank 1's, of the same round: live, its watermark said so.
    story = Story(policy("rules: [{name: first, match: {rank: 0}, action: warn}]")).start()
    story.say(1, nonfinite(7)).wait(2)
    story.say(0, nonfinite(7)).passed(7)
    assert replayed(story) == list(story.decisions)
    assert story.decision.rule == "first"


def test_a_warning_that_waited_for_the_end_of_an_incident():
    story = Story(policy(RULES)).start().bad(7).wait(5).passed(10).wait(5).passed(30)
    assert story.decision.action is Action.WARN
    assert replayed(story) == list(story.decisions)
    # An old log does not say when ranks were clean again; an incident that follows does.
    (row,) = replay(old_log_of(story), story.policy).rows
    assert (row.answer.decision, row.answer.silence) == (None, Silence.MAY_YET_MATCH)
    story.bad(60, rank=1)
    assert replay(old_log_of(story), story.policy).rows[0].answer.decision.id == story.decision.id


def test_a_rank_that_was_never_heard_of_is_waited_for_as_long_as_it_was_live():
    story = Story(policy(ROLL_BACK), world_size=2).start()
    story.events = [event for event in story.events if event.rank == 0]
    story.bad(7)
    (row,) = replay(log_of(story), story.policy).rows
    assert row.incident.verdict.unknown_ranks
    assert row.answer.decision.at == pytest.approx(story.now + 30, abs=0.1)


def test_a_budget_over_generations():
    story = Story(policy(RULES)).start()
    save(story, 4)
    for _ in range(3):
        for round_ in (10, 11, 12):
            story.wait(1).bad(round_, rank=1)
        story.perform().wait(90).start()
    assert [one.action for one in story.decisions] == [Action.ROLLBACK, Action.ROLLBACK, Action.HALT]
    again = replayed(story)
    assert [(one.id, one.action, one.rule, one.at, one.reason, one.checkpoint) for one in again] == [
        (one.id, one.action, one.rule, one.at, one.reason, one.checkpoint) for one in story.decisions
    ]


def test_a_cooldown_ends_between_two_records():
    story = Story(policy(ROLL_BACK + "    cooldown: 10m")).start()
    save(story, 1)
    story.bad(5).perform().wait(60).start().bad(6)
    for _ in range(11):
        story.wait(60)
    live, again = story.decisions[-1], replayed(story)[-1]
    assert (again.id, again.action) == (live.id, live.action)
    # Live it is noticed with the next tick.
    assert again.at <= live.at <= again.at + 60


def test_without_checkpoints_in_the_log_a_good_one_is_assumed_and_said_to_be():
    story = Story(policy(ROLL_BACK)).start().bad(7)
    found = replay(log_of(story), story.policy)
    assert found.assumptions == (ASSUMED,)
    assert replay(old_log_of(story), story.policy).assumptions == (PASSED, ASSUMED)
    assert found.rows[0].answer.decision.checkpoint.path == NO_PATH
    # There is none before the first step.
    story = Story(policy(ROLL_BACK)).start().bad(0)
    assert replay(log_of(story), story.policy).rows[0].answer.decision.checkpoint is None
    story = Story(policy(ROLL_BACK)).start()
    save(story, 1)
    assert replay(log_of(story), story.policy).assumptions == (SAVED,)


def test_what_would_not_have_happened_says_so():
    story = Story(policy("")).start().bad(7).bad(40)
    found = replay(log_of(story), policy(ROLL_BACK))
    assert found.rows[0].answer.decision.action is Action.ROLLBACK
    assert found.rows[1].answer.decision is None
    assert found.rows[1].answer.silence is Silence.CONFLICT


def test_of_a_kind_that_is_not_known():
    lines = lines_of(Story(policy("")).start())
    log = read_log([lines[0].replace('"hello"', '"goodbye"'), "", *lines[1:]], "events.jsonl")
    assert len(log.events) == 1
    assert "passed over: goodbye" in replay(log, policy("")).assumptions[-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "events.jsonl:2: this is no line of `gradwatch events JOB --json`: Invalid JSON"),
        ("{}", "events.jsonl:2: this is no line of `gradwatch events JOB --json`: id: Field required"),
        ('{"body": 1}', "events.jsonl:2: "),
        ("[1]", "events.jsonl:2: "),
    ],
)
def test_a_line_that_is_no_event(line: str, said: str):
    with pytest.raises(EventsError) as caught:
        read_log(["", line], "events.jsonl")
    assert said in str(caught.value)


def test_a_body_that_is_none():
    (line,) = lines_of(Story(policy(""), world_size=1).start())
    with pytest.raises(EventsError, match=r"events.jsonl:1: .*: world_size: Input should be a valid integer"):
        read_log([line.replace('"world_size":1', '"world_size":"many"')], "events.jsonl")
    assert hello(0, 1).world_size == 1


@pytest.mark.parametrize("lost_at", [5, 17])
def test_what_a_rank_had_lost_before_an_incident_opened(lost_at: int):
    story = Live(NO_WAY_BACK).start()
    for round_ in (3, lost_at, 19):
        dropped = {"device_behind": 1} if round_ >= lost_at else {}
        story._tell(progress("a1r1", round_ + 1, 1, dropped=dropped))
    story.say(0, nonfinite(17)).passed(30)
    unknown = story.incidents[0].verdict.unknown_ranks
    assert unknown == ({1: UnknownReason.RECORDS_LOST} if lost_at == 17 else {})
    check_again(story)


def test_a_healthy_run_has_no_progress_in_its_log_and_an_incident_a_bounded_number():
    story = Live(NO_WAY_BACK, world_size=4).start()
    for round_ in range(200):
        story.passed(round_)
    assert not [event for event in story.events if isinstance(event.body, Progress)]
    # NaN for ever; after a few records a rank only counts.
    story.bad(200)
    for round_ in range(201, 3000):
        for rank in range(4):
            story._bad[rank].add(round_)
        story.passed(round_)
    rows = [event for event in story.events if isinstance(event.body, Progress)]
    assert len(rows) <= 4 * (1 + 75) + 64 + 64 * 4
    assert len({(row.incarnation, row.seq) for row in rows}) == len(rows)
    check = replay(log_of(story), story.policy).rows
    live = story.incidents[0].evidence.last_round
    assert live >= check[0].incident.evidence.last_round >= live * 0.97
    assert [row.answer.decision.rule for row in check] == [one.rule for one in story.decisions] == ["burst"]


moves = st.one_of(
    st.tuples(
        st.just("bad"), st.sets(st.integers(0, 2), min_size=1), st.sampled_from([*GRADIENT_PHASES, None])
    ),
    st.tuples(st.just("bad"), st.just({1}), st.none()),
    st.tuples(st.just("train"), st.integers(1, 30)),
    st.tuples(st.just("save")),
    st.tuples(st.just("skip"), st.booleans()),
    st.tuples(st.just("restart"), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from([1, 100, 400])),
)


@dataclass
class Live(Story):
    """As a collector has it: each report at a time of its own, and in between a tick about every second."""

    next_tick: float = NOW + 0.3

    def _tell(self, *parts: obs.Batch | obs.Progress) -> None:
        self.wait(1)
        super()._tell(*parts)

    def wait(self, seconds: float) -> Story:
        until = self.now + seconds
        while self.next_tick < until:
            self.now = self.next_tick
            if self.state.jobs:
                super().wait(0)
            self.next_tick += 1.01 if self.next_tick % 1 < 0.9 else 0.4
        self.now = until
        return self


@settings(max_examples=100, deadline=None)
@given(st.lists(moves, min_size=5, max_size=40))
def test_random_histories_are_decided_as_they_were_live(history: list):
    story = Live(policy(RULES), world_size=3)
    story.say_launch(launch_started())
    story.start()
    save(story, 5)
    round_, step = 10, 10
    for what, *how in history:
        if what == "bad":
            ranks, phase = how
            for rank in sorted(ranks, reverse=True):
                story._bad[rank].add(round_)
                story.say(rank, nonfinite(round_, step=step, phase=phase))
            story.passed(round_)
            round_, step = round_ + 1, step + 1
        elif what == "train":
            round_, step = round_ + how[0], step + how[0]
            story.passed(round_ - 1)
        elif what == "save":
            save(story, step)
        elif what == "skip":
            story.say(0, Skipped(step, round_, consecutive=1, in_last_1000=1, exhausted=how[0]))
            story.passed(round_, last_bad_round=round_)
            round_, step = round_ + 1, step + 1
        elif what == "wait":
            story.wait(how[0])
        else:
            if story.decisions and story.decisions[-1].outcome.value == "pending":
                if story.decisions[-1].checkpoint is None:
                    break
                story.perform()
                step = story.decisions[-1].checkpoint.step
                story.start()
            else:
                story.start(story.generation if how[0] else None)
            round_ = 0
    story.say_launch(launch_ended())
    check_again(story)


def troubled(journals: list[Journal], chance: Random) -> list[Journal]:
    """Some ranks fall silent early, or say that they ended."""
    for place, journal in enumerate(journals):
        moments = journal.moments
        if chance.random() < 0.3:
            del moments[chance.randrange(1, len(moments)) :]
        if chance.random() < 0.5:
            moments[-1] = replace(moments[-1], progress=replace(moments[-1].progress, ended=True))
        journals[place] = replace(journal, bodies=journal.bodies[: moments[-1].records])
    return journals


@settings(max_examples=100, deadline=None)
@given(courses(), st.integers(0, 2**32), st.booleans())
def test_whatever_the_order_and_the_delay(course: Course, seed: int, in_full: bool):
    course = replace(course, in_full=in_full)
    chance = random.Random(seed)
    journals = troubled(simulate(course), chance)
    story = Live(NO_WAY_BACK, world_size=course.world_size)
    if launch := chance.random() < 0.5:
        story.say_launch(launch_started())
    shipped, at = [0] * len(journals), [0] * len(journals)
    for _ in range(40):
        index = chance.randrange(len(journals))
        journal = journals[index]
        at[index] = min(len(journal.moments) - 1, at[index] + chance.choice([1, 3, course.rounds]))
        moment = journal.moments[at[index]]
        story._tell(*journal.part(shipped[index], moment))
        shipped[index] = moment.records
        if chance.random() < 0.1:
            story.wait(chance.choice([3, 20, 40]))
    if launch and chance.random() < 0.5:
        story.say_launch(launch_ended())
    # Until nobody waits for anybody.
    story.wait(250)
    check_again(story)


def check_again(story: Story) -> None:
    """The log alone gives the live incidents and decisions, each at its time."""
    rows = replay(log_of(story), story.policy).rows
    again = {row.incident.id: row.incident for row in rows}
    live = story.state.incidents
    assert again.keys() == live.keys()
    for id_, incident in live.items():
        assert essence_of(again[id_]) == essence_of(incident)
        assert again[id_].close_reason == incident.close_reason
        for one, other in zip(times(again[id_]), times(incident), strict=True):
            assert one == pytest.approx(other, abs=1.1)
    decided = [row.answer.decision for row in rows if row.answer.decision is not None]
    assert sorted(map(known, decided)) == sorted(map(known, story.decisions))
    by_id = {one.id: one.at for one in decided}
    assert all(one.at == pytest.approx(by_id[one.id], abs=1.1) for one in story.decisions)


def times(incident: Incident) -> list[float | None]:
    return [incident.opened_at, incident.confirmed_at, incident.closed_at]


def known(one: Decision) -> tuple[object, ...]:
    return (one.id, one.action, one.rule, one.effect, one.quarantine, one.reason)
