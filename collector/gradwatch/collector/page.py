"""The web page: jobs and incidents at a glance. Pure; loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradwatch.collector.schema import IncidentDocument, JobDocument

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2430; }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #dde2e8; vertical-align: top }
.open { color: #a4262c; font-weight: 600 }
code { font-size: .9em }
"""

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

# Nothing but the page's own style is let in, whatever a job is called.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def render(jobs: Sequence[JobDocument], incidents: Sequence[IncidentDocument]) -> str:
    """The page as HTML."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="5">
<title>Gradwatch</title>
<style>{_STYLE}</style>
<h1>Gradwatch</h1>
<h2>Incidents</h2>
{_incidents(incidents)}
<h2>Jobs</h2>
{_jobs(jobs)}
</html>
"""


def _incidents(incidents: Sequence[IncidentDocument]) -> str:
    if not incidents:
        return "<p>No gradient has been non-finite.</p>"
    rows = [
        [
            f"<code>{escape(one.id)}</code>",
            escape(one.job),
            f'<span class="{"closed" if one.status == "closed" else "open"}">{one.status}</span>',
            escape(one.cause or "unknown"),
            "".join(f"<div>{escape(sentence)}</div>" for sentence in one.verdict),
            f"{one.opened_at:%Y-%m-%d %H:%M:%S} UTC",
        ]
        for one in incidents
    ]
    return _table(["id", "job", "status", "cause", "verdict", "opened"], rows)


def _jobs(jobs: Sequence[JobDocument]) -> str:
    if not jobs:
        return "<p>No job has reported yet.</p>"
    rows = [
        [
            escape(one.job),
            one.status,
            f"{one.ranks_watched} of {'?' if one.world_size is None else one.world_size}",
            _number(one.step),
            _number(one.slowest_step),
            "" if one.overhead.ratio is None else f"{one.overhead.ratio:.2%}",
            f"{one.last_seen:%Y-%m-%d %H:%M:%S} UTC",
        ]
        for one in jobs
    ]
    return _table(["job", "status", "ranks watched", "step", "slowest", "overhead", "last seen"], rows)


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{head}</th>" for head in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
