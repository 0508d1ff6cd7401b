"""Some of the field's programs, in the suite: `make field` runs all of them."""

from __future__ import annotations

import json

import pytest

from tests.field.run import PROGRAMS, judged, wrong_with

CASES = json.loads((PROGRAMS / "expect.json").read_text())

REPORT = {
    "warnings": [],
    "incidents": [
        {
            "generation": 0,
            "round": 5,
            "title": "non-finite gradient",
            "verdict": ["Rank 1 was first to have a non-finite gradient."],
            "likely": [{"kind": "domain", "text": "sqrt of 0"}],
            "first": {"rank": 1, "step": 5, "phase": "backward", "replay": {"module": "head"}},
        }
    ],
}


@pytest.mark.parametrize(
    ("want", "wrong"),
    [
        ("rank=1", []),
        ("rank=0|1", []),
        ("rank!=1", ["rank is '1', not !=1"]),
        ("step=4", ["step is '5', not =4"]),
        ("phase~^back", []),
        ("phase!~^back", ["phase is 'backward', not !~^back"]),
        ("replay.module=head", []),
        ("i.likely.0.kind=domain", []),
        ("i.likely.1.kind=None", []),
        ("i.verdict~Rank 1 was first", []),
        ("none", ["an incident: non-finite gradient"]),
    ],
)
def test_what_is_expected_of_a_report(want, wrong):
    assert judged(REPORT, [want]) == wrong


def test_hardware_that_is_accused_is_always_wrong():
    accusing = REPORT["incidents"][0] | {"verdict": ["Rank 1's device made it."]}
    assert judged(REPORT | {"incidents": [accusing]}, ["rank=1"])[0].startswith("hardware is accused")


def test_no_incident_answers_no_expectation():
    assert judged(REPORT | {"incidents": []}, ["rank=1"]) == ["rank is 'None', not =1"]


def test_a_line_that_is_no_expectation_is_refused():
    with pytest.raises(ValueError, match="is no expectation"):
        judged(REPORT, ["rank 1"])


@pytest.mark.parametrize("name", ["nanogpt_loop.py", "focal_half.py", "clean_imputed.py"])
def test_a_program_of_the_field_is_named_right(name, tmp_path):
    assert wrong_with(PROGRAMS, name, CASES[name], tmp_path) == []
