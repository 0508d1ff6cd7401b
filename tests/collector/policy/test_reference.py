"""The reference says what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from gradwatch.collector.policy.document import load_policy
from gradwatch.collector.policy.keys import ACTIONS, MATCH_KEYS
from gradwatch.collector.policy.model import Action, Match
from gradwatch.collector.policy.reference import BEGIN, END, table

PAGE = Path(__file__).parents[3] / "docs" / "policy.md"


def test_the_page_has_the_table():
    # To bring it up to date: print(gradwatch.collector.policy.reference.table())
    made = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert made.strip() == table()


def test_every_match_key_and_action_is_in_the_table():
    assert {key.name for key in MATCH_KEYS} == {field.name for field in fields(Match)}
    assert set(ACTIONS) == set(Action) - {Action.NONE}


def test_the_pages_example_loads():
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(load_policy(example.encode(), "policy.md").rules) == 4
