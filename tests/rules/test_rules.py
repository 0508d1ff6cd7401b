"""The alerting rules: what promtool says of them, and that each has what a person who is woken needs."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from gradwatch.collector.metrics import catalogue
from tests.ranks import REPOSITORY

RULES = REPOSITORY / "helm/gradwatch/rules/gradwatch.rules.yaml"
CASES = REPOSITORY / "tests/rules/gradwatch.test.yaml"
RUNBOOKS = REPOSITORY / "docs/runbooks"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]


def cases() -> list[dict[str, Any]]:
    tests = yaml.safe_load(CASES.read_text())["tests"]
    return [case for test in tests for case in test["alert_rule_test"]]


def test_promtool_has_nothing_to_say():
    for command in (["check", "rules", RULES], ["test", "rules", CASES]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_each_alert_is_shown_to_fire_and_to_keep_quiet(alert):
    fires = {bool(case["exp_alerts"]) for case in cases() if case["alertname"] == alert}
    assert fires == {True, False}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_names_job_and_rank_and_a_page_that_says_what_to_do(rule):
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    said = rule["annotations"]
    assert "$labels.training_job" in said["summary"] or "$labels.instance" in said["summary"]
    page = said["runbook_url"].removeprefix("https://gradwatch.github.io/gradwatch/runbooks/").strip("/")
    text = (RUNBOOKS / f"{page}.md").read_text()
    assert f"`{rule['alert']}`" in text
    for heading in ("## What it means", "## Look at", "## Do"):
        assert heading in text, f"{page}.md lacks {heading!r}"


def test_every_metric_of_the_rules_exists():
    known = {metric.name for metric in catalogue.ALL} | {
        rule["record"] for rule in rules() if "record" in rule
    }
    for rule in rules():
        text = rule["expr"] + str(rule.get("annotations", ""))
        for name in re.findall(r"\b[a-z_]*:?gradwatch_\w+(?::\w+)?", text):
            assert name in known, f"{name} in {rule.get('alert', rule.get('record'))}"
