"""A recorded history gives the decisions that the live one gave."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collector import document, tables
from gradwatch.collector.observations import Body, CheckpointSeen, GuardOff, Phase, Skipped
from gradwatch.collector.policy.log import Log, read_log
from gradwatch.collector.policy.model import Action
from gradwatch.collector.policy.problems import EventsError
from gradwatch.collector.policy.refusals import Silence
from gradwatch.collector.policy.replay import ASSUMED, NO_PATH, PASSED, SAVED, replay
from tests.collector.history import hello, launch_ended, launch_started, nonfinite
from tests.collector.policy.story import ROLL_BACK, Story, checkpoint, policy

if TYPE_CHECKING:
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
    assert kinds == set(tables._KINDS)
    story = Story(policy("")).start()
    for body in (GuardOff("x"), Skipped(1, 1, 1, 1, exhausted=False), CheckpointSeen("/c", None)):
        story.say(0, body)
    story.bad(3, rank=1, phase=Phase.LOSS)
    log = log_of(story)
    assert [one.record.body for one in log.events] == [one.body for one in story.events]
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


def test_a_warning_that_waited_for_the_end_of_an_incident_is_left_open():
    # The log does not say when ranks were clean again; an incident that follows does.
    story = Story(policy(RULES)).start().bad(7).passed(30)
    assert story.decision.action is Action.WARN
    (row,) = replay(log_of(story), story.policy).rows
    assert (row.answer.decision, row.answer.silence) == (None, Silence.MAY_YET_MATCH)
    story.bad(60, rank=1)
    assert replayed(story)[0].id == story.decision.id


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
    assert found.assumptions == (PASSED, ASSUMED)
    assert found.rows[0].answer.decision.checkpoint.path == NO_PATH
    # There is none before the first step.
    story = Story(policy(ROLL_BACK)).start().bad(0)
    assert replay(log_of(story), story.policy).rows[0].answer.decision.action is Action.HALT
    story = Story(policy(ROLL_BACK)).start()
    save(story, 1)
    assert replay(log_of(story), story.policy).assumptions == (PASSED, SAVED)


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


moves = st.one_of(
    st.tuples(st.just("bad"), st.sets(st.integers(0, 2), min_size=1), st.sampled_from([*Phase, None])),
    st.tuples(st.just("bad"), st.just({1}), st.none()),
    st.tuples(st.just("train"), st.integers(1, 30)),
    st.tuples(st.just("save")),
    st.tuples(st.just("skip"), st.booleans()),
    st.tuples(st.just("restart"), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from([1, 100, 4000])),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(moves, min_size=5, max_size=40))
def test_random_histories_are_decided_as_they_were_live(history: list):
    story = Story(policy(RULES.replace("cooldown: 1m", "")), world_size=3)
    story.say_launch(launch_started())
    story.start()
    save(story, 5)
    round_, step = 10, 10
    for what, *how in history:
        story.now += 1
        if what == "bad":
            ranks, phase = how
            for rank in sorted(ranks, reverse=True):
                story._bad[rank].add(round_)
                story.say(rank, nonfinite(round_, step=step, phase=phase))
            story.passed(round_)
            round_, step = round_ + 1, step + 1
        elif what == "train":
            round_, step = round_ + how[0], step + how[0]
        elif what == "save":
            save(story, step)
        elif what == "skip":
            story.say(0, Skipped(step, round_, consecutive=1, in_last_1000=1, exhausted=how[0]))
            story.passed(round_, last_bad_round=round_)
            round_, step = round_ + 1, step + 1
        elif what == "wait":
            story.now += how[0]
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
    story.now += 1
    story.say_launch(launch_ended())
    # When an incident closed is not in the log, so a warning that waited for that may be missing.
    acted = {Action.ROLLBACK, Action.HALT}
    live, again = list(story.decisions), replayed(story)
    assert [known(one) for one in again if one.action in acted] == [
        known(one) for one in live if one.action in acted
    ]
    assert {known(one) for one in again} <= {known(one) for one in live}


def known(one: Decision) -> tuple[object, ...]:
    return (one.id, one.action, one.rule, one.checkpoint, one.quarantine, one.reason)
