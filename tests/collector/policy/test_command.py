"""`gradwatch policy check` and `gradwatch policy test` as a user has them."""

from __future__ import annotations

import json

import pytest

from tests.cli.command import gradwatch
from tests.collector.policy.story import HEAD, Story, policy
from tests.collector.policy.test_replay import lines_of

POLICY = """
mode: enforce
rules:
- {name: any, match: {}, action: rollback}
checkpoints: {root: /ckpts}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(HEAD + POLICY)
    return path


@pytest.fixture
def events(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join(lines_of(Story(policy("")).start().bad(7, rank=1).bad(40))))
    return path


def test_a_policy_is_told(file):
    result = gradwatch("policy", "check", file)
    assert result.returncode == 0
    assert "rule 0, any: when there is an incident, go back to the newest good checkpoint" in result.stdout
    document = gradwatch("policy", "check", file, "--json").json
    assert document["valid"]
    assert document["policy_hash"] in result.stdout
    assert document["problems"] == []
    assert (document["guard"], document["checkpoints"]) == (None, {"root": "/ckpts", "layout": "auto"})


def test_a_wrong_one_is_an_error_with_file_line_and_key(file):
    file.write_text(HEAD + "mod: enforce\ncooldown: 3\n")
    result = gradwatch("policy", "check", file)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first.startswith(f"gradwatch: {file}:2: mod: unknown key (did you mean 'mode'?); allowed are ")
    assert second.startswith(f"gradwatch: {file}:3: cooldown: must be a duration such as")
    shown = gradwatch("policy", "check", file, "--json")
    assert shown.returncode == 1
    assert [(one["line"], one["key"]) for one in shown.json["problems"]] == [(2, "mod"), (3, "cooldown")]


def test_wrong_use(file, tmp_path):
    assert gradwatch("policy", "check").returncode == 2
    missing = gradwatch("policy", "check", tmp_path / "none.yaml")
    assert missing.returncode == 2
    assert "none.yaml cannot be read: No such file or directory" in missing.stderr
    assert gradwatch("policy", "test", file).returncode == 2


def test_a_policy_is_tried_on_a_history(file, events):
    result = gradwatch("policy", "test", file, events)
    assert result.returncode == 0
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["at", "step", "rank", "cause", "rule", "action", "outcome", "what", "why"]
    assert rows[0].split()[1:7] == ["7", "1", "-", "any", "rollback", "pending"]
    assert "rolls generation 0 back already" in rows[1]
    assert "gradwatch: the log tells of no checkpoints" in result.stderr


def test_its_decisions_are_json_lines(file, events):
    result = gradwatch("policy", "test", file, "-", "--json", stdin=events.read_text())
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["action"], first["rule"], first["checkpoint"]["step"]) == ("rollback", "any", 6)
    assert (second["action"], second["silence"]) == (None, "conflict")
    assert {"id", "action", "outcome", "rule", "reason", "policy_hash", "checkpoint", "at"} <= set(first)


def test_a_history_that_is_none(file, events):
    events.write_text("{}\n")
    result = gradwatch("policy", "test", file, events)
    assert result.returncode == 1
    assert f"gradwatch: {events}:1: this is no line of `gradwatch events JOB --json`" in result.stderr
    events.write_text("")
    assert gradwatch("policy", "test", file, events).stdout == "there are no incidents in that history\n"
