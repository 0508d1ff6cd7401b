"""When a fault is called a device's: on proof alone, by replays that are shown to have repeated the pass."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.model import Judgement, LikelyKind
from tests.collector.bodies import autopsy, bad_on, reduced, told_of
from tests.collector.history import Told, batch, gradient, nonfinite

BAD, FINITE = obs.Replay.REPRODUCED, obs.Replay.FINITE
# An operator that explains nothing.
PLAIN = {"operator": "aten.mm.default", "inputs": ()}
ACCUSES = re.compile(r"(?i)\bdevices?\b|\bhardware\b|\btake \S+( of \S+ \S+)? out\b|\bmemory\b|\blinks?\b")


def rehearsal(of_round: int, equal: bool, *doubts: str, root: int = 0) -> obs.Rehearsal:
    return obs.Rehearsal(root, of_round + 1, of_round + 1, of_round, equal, doubts)


def said(told: Told) -> str:
    verdict = told.incident.verdict
    return " ".join([*verdict.sentences, *(f"{one.because} {one.remedy}" for one in verdict.likely)])


# Of rank 1's own replay that stayed finite: whether it is faithful, its clean pass, and what follows.
OWN = [
    (True, None, Judgement.TRANSIENT),
    (None, rehearsal(5, True), Judgement.TRANSIENT),
    (None, rehearsal(5, False, "the weights moved"), Judgement.NOT_REPRODUCED),
    (None, None, Judgement.NOT_REPRODUCED),
    # Of another round, or another model.
    (None, rehearsal(4, True), Judgement.NOT_REPRODUCED),
    (None, rehearsal(5, True, root=1), Judgement.NOT_REPRODUCED),
    # A clean pass that came out equal does not make up for what is known to be different.
    (False, rehearsal(5, True), Judgement.NOT_REPRODUCED),
]


@pytest.mark.parametrize(("faithful", "clean", "judgement"), OWN)
def test_a_replay_that_stayed_finite(faithful, clean, judgement):
    told = bad_on(1)
    told.tell(batch("r1", 2, autopsy(1, 5, FINITE, operator=None, phase=None, faithful=faithful)))
    told.tell(*([] if clean is None else [batch("r1", 3, clean)]))
    verdict = told.incident.verdict
    assert verdict.judgement is judgement
    is_device = verdict.likely[0].kind is LikelyKind.DEVICE
    assert is_device == (judgement is Judgement.TRANSIENT)
    assert bool(ACCUSES.search(said(told))) == is_device
    # What came out equal is what was compared.
    assert ("all else came out equal" in said(told)) == (faithful is True)
    assert ("a clean pass, replayed likewise, came out equal" in said(told)) == (is_device and not faithful)


def test_a_clean_pass_is_replayed_after_the_verdict_and_revises_it():
    told = bad_on(1)
    told.tell(batch("r1", 2, autopsy(1, 5, FINITE, operator=None, phase=None)))
    assert told.incident.verdict.judgement is Judgement.NOT_REPRODUCED
    told.tell(batch("r1", 3, rehearsal(5, True)))
    assert told.incident.verdict.judgement is Judgement.TRANSIENT
    assert told.incident.verdict.doubts == ()


def test_what_may_be_behind_a_replay_that_differs_is_one_sentence():
    told = bad_on(1)
    doubts = ("module encoder keeps a Generator", "module head counts its calls")
    told.tell(batch("r1", 2, autopsy(1, 5, FINITE, operator=None, faithful=False, doubts=doubts)))
    assert document.incident(told.incident).doubts == [*doubts]
    (about,) = [text for text in told.incident.verdict.sentences if "not shown" in text]
    assert about == (
        "Replayed on rank 1 it stayed finite, and the replay is not shown to have repeated the pass: module "
        "encoder keeps a Generator; module head counts its calls."
    )


# Of a fault that rank 1 repeats: what each other rank found, and whether a device is named.
OTHERS = [
    # A strict majority of three that know it.
    ({0: (FINITE, True), 2: (FINITE, True)}, Judgement.ONLY_THERE, True),
    ({0: (FINITE, True), 2: (FINITE, True), 3: (FINITE, None)}, Judgement.ONLY_THERE, True),
    # One that disagrees shows a difference, and not whose.
    ({0: (FINITE, True)}, Judgement.ONLY_THERE, False),
    ({0: (FINITE, True), 2: (FINITE, False)}, Judgement.ONLY_THERE, False),
    # Nobody is shown to have repeated the pass.
    ({0: (FINITE, False), 2: (FINITE, None)}, Judgement.REPEATED_THERE, False),
    # Somebody had the same.
    ({0: (FINITE, True), 2: (FINITE, True), 3: (BAD, None)}, Judgement.DETERMINISTIC, False),
]


@pytest.mark.parametrize(("others", "judgement", "is_device"), OTHERS)
def test_a_fault_that_comes_again_on_one_rank(others, judgement, is_device):
    told = bad_on(1, autopsy(1, 5, BAD, **PLAIN), world_size=4)
    for rank, (replay, faithful) in others.items():
        told.tell(batch(f"r{rank}", 2, autopsy(1, 5, replay, faithful=faithful, **PLAIN)))
    verdict = told.incident.verdict
    assert verdict.judgement is judgement
    assert (verdict.likely[0].kind is LikelyKind.DEVICE) == is_device
    only_there = judgement is Judgement.ONLY_THERE
    # Without a majority it is said that the two differ, and not which is broken.
    assert ("its hardware, or what differs in that process" in said(told)) == (only_there and not is_device)
    assert bool(ACCUSES.search(said(told))) == only_there


def test_an_operator_that_explains_it_leaves_nothing_for_a_device():
    told = bad_on(1, autopsy(1, 5, BAD))
    for rank in (0, 2):
        told.tell(batch(f"r{rank}", 2, autopsy(1, 5, FINITE, faithful=True)))
    assert told.incident.verdict.judgement is Judgement.ONLY_THERE
    assert [one.kind for one in told.incident.verdict.likely] == [LikelyKind.DOMAIN]
    assert not ACCUSES.search(said(told))


def test_bad_data_leaves_nothing_for_a_device():
    told = Told().hellos(2)
    told.tell(*told_of(0, 5, reduced(5)))
    bad = nonfinite(5, phase=obs.Phase.INPUT)
    told.tell(*told_of(1, 5, bad, autopsy(1, 5, FINITE, operator=None, faithful=True)))
    assert [one.kind for one in told.incident.verdict.likely] == [LikelyKind.BAD_DATA]
    assert not ACCUSES.search(said(told))


@pytest.mark.parametrize("phase", [obs.Phase.LOSS, obs.Phase.BACKWARD, obs.Phase.PARAMETER])
def test_ranks_that_tie_have_no_broken_device(phase):
    told = Told().hellos(4)
    for rank in range(4):
        replay = autopsy(rank, 5, FINITE, operator=None, phase=None, faithful=True)
        told.tell(*told_of(rank, 5, nonfinite(5, phase=phase), replay))
    # By itself it would accuse one.
    assert told.incident.verdict.judgement is Judgement.TRANSIENT
    assert told.incident.verdict.tie
    assert not ACCUSES.search(said(told))


# The dtype of the gradient, and what is said of how its sum came to be infinite.
SUMS = [
    ("float32", "is float32, which ends at 3.4e+38, or a shorter one into which a communication hook"),
    ("float16", "is float16, which ends at 65504. Reduce in fp32, or with smaller values."),
    ("float8", "reduced. Reduce in fp32, or with smaller values. Look at what works on gradients"),
]


@pytest.mark.parametrize(("dtype", "says"), SUMS)
def test_a_hook_may_have_made_the_sum_infinite(dtype, says):
    told = Told().hellos(2)
    bad = replace(gradient(position=None, value=obs.Value.POSITIVE_INFINITY), dtype=dtype)
    for rank in range(2):
        told.tell(*told_of(rank, 7, reduced(7, bad)))
    assert says in said(told)
    assert "no rank made it" not in said(told)


def test_weights_of_one_rank_alone_accuse_nothing():
    told = Told().hellos(3)
    for rank in (0, 2):
        told.tell(*told_of(rank, 5, reduced(5)))
    told.tell(*told_of(1, 5, nonfinite(5, phase=obs.Phase.PARAMETER, weights_finite=False)))
    assert told.incident.verdict.likely[0].kind is LikelyKind.UNKNOWN
    assert not ACCUSES.search(said(told))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (obs.Value.POSITIVE_INFINITY, "more than the dtype can hold"),
        (obs.Value.NEGATIVE_INFINITY, "more than the dtype can hold"),
        (obs.Value.NAN, "how their sum came to be NaN is not known"),
        (None, "how their sum came to be not finite is not known"),
    ],
)
def test_a_bad_sum_accuses_nothing_and_is_called_an_overflow_only_if_it_is_one(value, says):
    told = Told().hellos(2)
    for rank in range(2):
        told.tell(*told_of(rank, 7, reduced(7, gradient(position=None, value=value))))
    assert says in said(told)
    assert not ACCUSES.search(said(told))
