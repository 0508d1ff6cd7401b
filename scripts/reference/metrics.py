"""The reference of the metrics, from their catalogue, the rules and the dashboards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from gradwatch.collector.metrics import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradwatch.collector.metrics.catalogue import Metric

CHART = Path(__file__).parents[2] / "helm" / "gradwatch"
RULES = CHART / "rules" / "gradwatch.rules.yaml"
DASHBOARDS = CHART / "dashboards"

_HEAD = """# Metrics

All that a collector exports at `/metrics`, and which alert and which dashboard asks for it. Made from the code
by `python -m scripts.reference`. [Prometheus](prometheus.md) says how to scrape it.

- Labels never take a step, a path, an id or a parameter's name: the number of series is bounded, by 2,000 in
  all (`gradwatch collector --max-series`). The incident's id is an exemplar, in OpenMetrics.
- None is called `job`, `instance`, `node`, `namespace` or `pod`: a Prometheus server sets those itself.
- Counters begin at 0 with a job's first report, so that `increase()` sees the first event; those of single
  ranks begin with the first event.
- A job that ended an hour ago is no longer told of.
"""


class Use(NamedTuple):
    """Where a metric is asked for."""

    alerts: tuple[str, ...]
    dashboards: tuple[str, ...]


def uses() -> dict[str, Use]:
    """Where each metric of the catalogue is asked for, by its name."""
    alerts, dashboards = list(_alerts()), list(_dashboards())
    return {
        metric.name: Use(
            tuple(sorted({name for name, text in alerts if _names(metric.name, text)})),
            tuple(sorted({name for name, text in dashboards if _names(metric.name, text)})),
        )
        for metric in catalogue.ALL
    }


def page() -> str:
    """The whole page, in Markdown."""
    used = uses()
    rows = [_row(metric, used[metric.name]) for metric in catalogue.ALL]
    return "\n".join([_HEAD, "| metric | labels | | asked for by |", "|---|---|---|---|", *rows, ""])


def _row(metric: Metric, use: Use) -> str:
    by = [f"`{alert}`" for alert in use.alerts] + [f"dashboard {name}" for name in use.dashboards]
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    asked = ", ".join(by) or metric.unwatched
    return f"| `{metric.name}`<br>{metric.kind.value} | {labels} | {metric.help} | {asked} |"


def _alerts() -> Iterator[tuple[str, str]]:
    """Each alert's name and what it asks for, with that of the recorded series that it asks for."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    for rule in rules:
        if "alert" in rule:
            text = rule["expr"] + rule["annotations"]["summary"]
            yield rule["alert"], text + "".join(expr for name, expr in recorded.items() if name in text)


def _dashboards() -> Iterator[tuple[str, str]]:
    for file in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(file.read_text())
        for panel in dashboard["panels"]:
            yield from ((file.stem, target["expr"]) for target in panel["targets"])
        yield from ((file.stem, one["expr"]) for one in dashboard["annotations"]["list"] if one.get("expr"))


def _names(metric: str, text: str) -> bool:
    return re.search(rf"(?<![\w:]){metric}(?![\w:])", text) is not None
