"""Whatever the order in which journals arrive, and however often, the verdict is the same."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.collector.history import Told, batch, gradient, hello, nonfinite, progress

if TYPE_CHECKING:
    from gradwatch.collector import observations as obs
    from gradwatch.collector.model import Incident, State

# After so many bad rounds in a row the simulated probe only counts them.
IN_FULL = 8


@dataclass(frozen=True)
class Moment:
    """What a rank's spool holds at one time: its journal up to `records`, and its progress file."""

    records: int
    progress: obs.Progress


@dataclass(frozen=True)
class Journal:
    incarnation: str
    bodies: list[obs.Body]
    moments: list[Moment]

    def part(self, start: int, moment: Moment) -> list[obs.Batch | obs.Progress]:
        """What a sidecar sends that has shipped `start` records."""
        bodies = self.bodies[start : moment.records]
        shipped: list[obs.Batch | obs.Progress] = [moment.progress]
        if bodies:
            shipped.insert(0, batch(self.incarnation, start, *bodies))
        return shipped


def simulate(world_size: int, rounds: int, bad: dict[int, dict[int, int]]) -> list[Journal]:
    """A job's journals.

    Args:
        bad: by round, the ranks that were bad, and the backward position of what they saw.
    """
    journals = []
    for rank in range(world_size):
        incarnation = f"r{rank}"
        bodies: list[obs.Body] = [hello(rank, world_size)]
        moments = [Moment(1, progress(incarnation, 0, 1))]
        seen, streak, last_bad = 0, 0, None
        for round_ in range(rounds):
            position = bad.get(round_, {}).get(rank)
            if position is None:
                streak = 0
            else:
                seen += 1
                if streak < IN_FULL:
                    bodies.append(nonfinite(round_, gradient(position=position)))
                streak += 1
            if round_ in bad:
                last_bad = round_
            moments.append(
                Moment(
                    len(bodies),
                    progress(
                        incarnation,
                        round_ + 1,
                        len(bodies),
                        bad_rounds=seen,
                        last_bad_round=last_bad,
                        dropped={"repeated": 1} if seen else {},
                    ),
                )
            )
        journals.append(Journal(incarnation, bodies, moments))
    return journals


def in_step(journals: list[Journal]) -> State:
    """Told as it happens, round by round."""
    told = Told()
    shipped = [0] * len(journals)
    for time in range(len(journals[0].moments)):
        for index, journal in enumerate(journals):
            moment = journal.moments[time]
            told.tell(*journal.part(shipped[index], moment))
            shipped[index] = moment.records
    return told.state


def essence(state: State) -> tuple[object, ...]:
    return (
        sorted((essence_of(incident) for incident in state.incidents.values()), key=repr),
        state.jobs["j"].incidents_confirmed,
        state.jobs["j"].nonfinite_events,
        state.jobs["j"].dropped,
        {key: journal.rank.nonfinite_events for key, journal in state.journals.items() if journal.rank},
    )


def essence_of(incident: Incident) -> tuple[object, ...]:
    return (incident.id, incident.status, incident.evidence, incident.verdict)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, dict[int, dict[int, int]]]:
    world_size = draw(st.integers(2, 4))
    rounds = draw(st.integers(1, 60))
    bad = draw(
        st.dictionaries(
            st.integers(0, rounds - 1),
            st.dictionaries(st.integers(0, world_size - 1), st.integers(0, 3), min_size=1),
            max_size=IN_FULL - 1,
        )
    )
    # From here on the weights are NaN, and all is.
    for round_ in range(draw(st.integers(0, rounds * 2)), rounds):
        bad[round_] = dict.fromkeys(range(world_size), 0)
    return world_size, rounds, bad


@settings(max_examples=200, deadline=None)
@given(histories(), st.integers(0, 2**32))
def test_any_order(history: tuple[int, int, dict[int, dict[int, int]]], seed: int):
    chance = random.Random(seed)
    world_size, rounds, bad = history
    journals = simulate(world_size, rounds, bad)
    told = Told()
    shipped = [0] * world_size
    at = [0] * world_size
    while any(
        at[index] < len(journal.moments) - 1 or not shipped[index] for index, journal in enumerate(journals)
    ):
        index = chance.randrange(world_size)
        journal = journals[index]
        at[index] = min(len(journal.moments) - 1, at[index] + chance.randint(1, rounds))
        moment = journal.moments[at[index]]
        # Sent but not acknowledged: it comes again, with what has been added since.
        start = chance.randint(0, shipped[index])
        parts = journal.part(start, moment)
        told.tell(*parts)
        if chance.random() < 0.5:
            told.tell(*parts)
        shipped[index] = moment.records
    assert essence(told.state) == essence(in_step(journals))


@settings(max_examples=50, deadline=None)
@given(histories())
def test_first_is_the_earliest_of_all(history: tuple[int, int, dict[int, dict[int, int]]]):
    world_size, rounds, bad = history
    state = in_step(simulate(world_size, rounds, bad))
    if not bad:
        assert not state.incidents
        return
    first_round = min(bad)
    position, rank = min((position, rank) for rank, position in bad[first_round].items())
    incident = min(state.incidents.values(), key=lambda one: one.evidence.first_round)
    assert incident.verdict.first is not None
    assert (incident.verdict.first.round, incident.verdict.first.rank) == (first_round, rank)
    assert incident.verdict.first.backward_position == position
    assert {origin.rank for origin in incident.verdict.origins} == set(bad[first_round])
    assert set(incident.verdict.clean_ranks) == set(range(world_size)) - set(bad[first_round])
