"""What the reference is made of is what the reader of a policy takes."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from gradwatch.collector.policy.document import load_policy
from gradwatch.collector.policy.keys import ACTIONS, MATCH_KEYS
from gradwatch.collector.policy.model import Action, Match
from gradwatch.collector.policy.problems import PolicyError
from scripts.reference.settings import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"

# A key that nobody knows, in each section.
STRANGE = b"""\
apiVersion: gradwatch/v1
strange: 1
guard: {strange: 1}
rules:
  - {name: a, match: {strange: 1}, action: warn, strange: 1}
checkpoints: {root: /ckpts, strange: 1}
rollback: {strange: 1}
budgets:
  - {scope: job, max: 1, strange: 1}
"""


def allowed() -> dict[str, set[str]]:
    """The keys that the reader allows, by section, as its messages say."""
    with pytest.raises(PolicyError) as caught:
        load_policy(STRANGE, "p.yaml")
    found = {}
    for problem in caught.value.problems:
        if "allowed are" in problem.message:
            section = re.sub(r"\[0\]", "[]", problem.key.removesuffix("strange").rstrip("."))
            _, _, names = problem.message.partition("allowed are ")
            found[section] = set(re.split(r", | and | or ", names))
    return found


def test_every_setting_is_in_the_reference_and_no_other():
    told: dict[str, set[str]] = {}
    for setting in SETTINGS:
        section, _, key = setting.name.rpartition(".")
        told.setdefault(section, set()).add(key)
    told["rules[].match"] = {key.name for key in MATCH_KEYS}
    assert allowed() == told


def test_every_match_key_and_action_is_in_the_reference():
    assert {key.name for key in MATCH_KEYS} == {field.name for field in fields(Match)}
    assert set(ACTIONS) == set(Action) - {Action.NONE}


def test_the_pages_example_loads():
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(load_policy(example.encode(), "policy.md").rules) == 4
