"""One incident: who was first, how the job went around it, what was done about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.dashboards.job import JOB
from scripts.dashboards.parts import annotation, board, figure, lines, rows, variable

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.dashboard import Dashboard

RANK = f'{JOB},rank=~"$rank"'


def incident() -> Dashboard:
    """The dashboard of one incident: choose the job, and the time around it."""
    return (
        board(
            "gradwatch-incident",
            "Gradwatch / Incident",
            "Who was first, and what was done. The verdict in words is on the collector's page, and in `gradwatch incident ID`.",
        )
        .with_variable(variable("training_job", "Job", "label_values(gradwatch_job_running, training_job)"))
        .with_variable(
            variable(
                "rank",
                "Rank",
                f"label_values(gradwatch_rank_nonfinite_events_total{{{JOB}}}, rank)",
                several=True,
            )
        )
        .annotation(
            annotation(
                "Incidents", "red", f"sum by (cause) (increase(gradwatch_incidents_total{{{JOB}}}[2m])) > 0"
            )
        )
        .annotation(
            annotation(
                "Decisions",
                "blue",
                f"sum by (action, outcome) (increase(gradwatch_decisions_total{{{JOB}}}[2m])) > 0",
            )
        )
        .with_panel(
            figure(
                "Open now",
                f"sum(gradwatch_incidents_open{{{JOB}}})",
                "Incidents that are not closed.",
                bad_above=1,
            )
        )
        .with_panel(
            figure(
                "First rank",
                f"max(gradwatch_incident_first_rank{{{JOB}}})",
                "The rank that was first, while the incident is open.",
            )
        )
        .with_panel(
            rows(
                "Ranks that were first",
                {
                    "times first": f"sum by (rank, host) (gradwatch_rank_incidents_total{{{RANK}}})",
                    "last time, seconds ago": f"time() - max by (rank, host) (gradwatch_rank_last_incident_timestamp_seconds{{{RANK}}})",
                },
                "The same rank again and again is its data or its device.",
                width=16,
            )
        )
        .with_panel(
            lines(
                "Incidents",
                {"{{cause}}": f"sum by (cause) (gradwatch_incidents_total{{{JOB}}}) > 0"},
                "By cause; each point's exemplar is the incident's id.",
                exemplars=True,
            )
        )
        .with_panel(
            lines(
                "How it spread",
                {
                    "rank {{rank}} on {{host}}": f"sum by (rank, host) (gradwatch_rank_nonfinite_events_total{{{RANK}}})"
                },
                "Non-finite local gradients: the first rank begins, those that follow were contaminated by an update.",
            )
        )
        .with_panel(
            lines(
                "Step",
                {
                    "ahead": f"max(gradwatch_job_step{{{JOB}}})",
                    "behind": f"min(gradwatch_job_slowest_step{{{JOB}}})",
                },
                "A fall is a rollback; a flat line is a job that hangs, or is being started again.",
            )
        )
        .with_panel(
            lines(
                "Silent ranks",
                {
                    "rank {{rank}} on {{host}}": f"gradwatch_rank_silent_seconds{{{JOB}}}"
                    f" or 0 * max by (training_job) (gradwatch_job_running{{{JOB}}})",
                },
                "Since a rank last came further, from 60 s on. Such a rank is named unknown in a verdict.",
                unit="s",
            )
        )
    )
