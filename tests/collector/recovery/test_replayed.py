"""`policy test` on a recorded run takes the decisions that the live run took, and sees them performed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from gradwatch.collector import document, tables
from gradwatch.collector.policy.log import read_log
from gradwatch.collector.policy.replay import replay
from tests.collector.recovery.test_performing import POLICY, poisoned
from tests.collector.recovery.world import ROOT, World

if TYPE_CHECKING:
    from gradwatch.collector.policy.decision import Decision


def decided_again(world: World) -> list[Decision]:
    lines = []
    for number, event in enumerate(world.events, start=1):
        row = tables.event_row(event)
        row["body"] = json.loads(row["body"])
        lines.append(document.event({"id": number, **row}).model_dump_json())
    policy = world.policy.policy
    assert policy is not None
    replayed = replay(read_log(lines, "events.jsonl"), policy, world.config)
    assert not replayed.assumptions
    return [row.answer.decision for row in replayed.rows if row.answer.decision is not None]


def healed() -> World:
    world = poisoned(hosts=2)
    world.saves_when_told = True
    world.settle()
    world.train(20)
    return world


def flapping() -> World:
    world = poisoned()
    for _ in range(8):
        world.settle()
        if world.training is None:
            break
        world.train(1)
        world.train(2, bad_rank=0)
    return world


def missing_launcher() -> World:
    world = poisoned(hosts=2)
    world.obey(world.hosts[0])
    world.kill_launcher(world.hosts[1])
    for _ in range(125):
        world.wait(1.0)
    world.settle()
    return world


def in_process() -> World:
    world = poisoned(hosts=2, can_load=True)
    world.settle()
    world.train(20)
    return world


def nothing_good() -> World:
    world = World.under(POLICY)
    world.launch(world.hosts[0])
    world.settle()
    world.train(2, bad_rank=0)
    world.settle()
    return world


def crashed() -> World:
    world = World.under(POLICY)
    world.launch(world.hosts[0])
    world.settle()
    world.train(5)
    world.save(f"{ROOT}/5")
    world.look_after()
    world.train(1)
    world.crash(at_a_nan=True)
    world.settle()
    return world


STORIES = [healed, flapping, missing_launcher, in_process, nothing_good, crashed]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_the_same_decisions_are_taken(story):
    world = story()
    assert world.decisions
    again = decided_again(world)
    assert [replace(one, at=0.0) for one in again] == [replace(one, at=0.0) for one in world.decisions]
    for live, replayed in zip(world.decisions, again, strict=True):
        assert replayed.at == pytest.approx(live.at, abs=1.5)
