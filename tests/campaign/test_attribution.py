"""The catalogue of faults once; the whole of it is `make attribution`."""

from __future__ import annotations

import random

import pytest

from tests.campaign.attribution import Tally, campaign, judge, passed
from tests.training.catalogue import CLEAN, REPLICATED, SHARDED


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_each_fault_of_the_catalogue_is_named_right_and_what_is_no_fault_raises_no_incident():
    seed = random.SystemRandom().randrange(1 << 30)
    plan = [*REPLICATED, *random.Random(seed).sample(sorted(SHARDED), 3), *CLEAN]
    tallies, wrong = campaign(plan, seed, [3])
    assert passed(tallies, wrong), f"seed {seed}\n" + "\n".join(wrong)
    assert {name for name, tally in tallies.items() if tally.runs == 1} == set(plan)


EXPECTED = {"rank": 1, "step": 12, "cause": "input", "operator": "aten.log.default"}
RIGHT = {
    "step": 12,
    "cause": "input",
    "tie": False,
    "first": {"rank": 1, "operator": "aten.log.default"},
    "origins": [{"rank": 1}],
}
OTHER_OPERATOR = {**RIGHT, "first": {"rank": 1, "operator": "aten.div.Tensor"}}
BROKEN = {"rank": 1, "step": 12, "judgement": "transient", "found": True}
ACCUSED = {**RIGHT, "judgement": "transient", "likely": [{"kind": "bad_data"}, {"kind": "device"}]}


@pytest.mark.parametrize(
    ("expected", "incidents", "right"),
    [
        (EXPECTED, [RIGHT], True),
        (EXPECTED, [OTHER_OPERATOR], False),
        (EXPECTED, [], False),
        (EXPECTED, [RIGHT, RIGHT], False),
        (EXPECTED, [{**RIGHT, "first": {"rank": 2}}], False),
        (EXPECTED, [{**RIGHT, "first": None}], False),
        (EXPECTED, [{**RIGHT, "step": 11}], False),
        (EXPECTED, [{**RIGHT, "cause": "loss"}], False),
        # Outside of the case's own steps.
        (EXPECTED, [{**RIGHT, "step": 25}], False),
        # A device is found where it is broken, and is accused nowhere else.
        (BROKEN, [ACCUSED], True),
        (BROKEN, [{**ACCUSED, "likely": [{"kind": "bad_data"}]}], False),
        (BROKEN, [{**ACCUSED, "judgement": "not_reproduced"}], False),
        (EXPECTED, [ACCUSED], False),
        (None, [], True),
        (None, [RIGHT], False),
        (None, [{**RIGHT, "step": 25}], True),
    ],
)
def test_a_wrong_verdict_is_a_mistake(expected, incidents, right):
    case = {"class": "a class", "fault": None, "from": 0, "steps": 14, "expected": expected}
    tallies: dict[str, Tally] = {}
    wrong = list(judge([case], incidents, tallies))
    assert passed(tallies, wrong) is right
    assert (not wrong) is right
