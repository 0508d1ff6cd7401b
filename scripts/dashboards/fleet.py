"""The fleet: all jobs of all collectors at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.dashboards.parts import annotation, board, figure, lines, rows

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.dashboard import Dashboard


def fleet() -> Dashboard:
    """Is any job in trouble?"""
    return (
        board("gradwatch-fleet", "Gradwatch / Fleet", "All jobs at a glance: is any in trouble?")
        .annotation(
            annotation(
                "Incidents",
                "red",
                "sum by (training_job, cause) (increase(gradwatch_incidents_total[2m])) > 0",
            )
        )
        .annotation(
            annotation(
                "Rollbacks",
                "blue",
                'sum by (training_job) (increase(gradwatch_rollbacks_total{outcome="performed"}[2m])) > 0',
            )
        )
        .with_panel(
            figure(
                "Incidents open",
                "sum(gradwatch_incidents_open)",
                "Incidents that are suspected or confirmed, and not closed.",
                bad_above=1,
            )
        )
        .with_panel(
            figure(
                "Incidents, 24 h",
                "sum(increase(gradwatch_incidents_total[24h]))",
                "Confirmed incidents of the last day.",
            )
        )
        .with_panel(
            figure(
                "Rollbacks, 24 h",
                'sum(increase(gradwatch_rollbacks_total{outcome="performed"}[24h]))',
                "Rollbacks of the last day that were performed.",
            )
        )
        .with_panel(figure("Jobs running", "sum(gradwatch_job_running)", "Jobs whose run goes on."))
        .with_panel(
            figure(
                "Ranks watched",
                'sum(gradwatch_job_ranks{state="watched"})',
                "Ranks in which a probe reports.",
            )
        )
        .with_panel(
            figure(
                "Ranks not watched",
                'sum(gradwatch_job_ranks{state="missing"}) + sum(gradwatch_job_unwatched_processes)',
                "Ranks of running jobs in which no probe reports, and processes that say that nothing in them is watched.",
                bad_above=1,
            )
        )
        .with_panel(
            rows(
                "Jobs",
                {
                    "running": "max by (training_job) (gradwatch_job_running)",
                    "incidents open": "max by (training_job) (gradwatch_incidents_open)",
                    "incidents, 24 h": "sum by (training_job) (increase(gradwatch_incidents_total[24h]))",
                    "step": "max by (training_job) (gradwatch_job_step)",
                    "generation": "max by (training_job) (gradwatch_job_generation)",
                    "good checkpoint at step": "max by (training_job) (gradwatch_last_good_checkpoint_step)",
                    "overhead": "max by (training_job) (gradwatch_agent_overhead_ratio)",
                },
                "Each job as it is now.",
            )
        )
        .with_panel(
            lines(
                "Non-finite gradients",
                {
                    "{{training_job}}, {{cause}}": "sum by (training_job, cause) (rate(gradwatch_nonfinite_events_total[5m]))"
                },
                "Reports of non-finite local gradients a second, by cause.",
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Steps a second",
                {"{{training_job}}": "max by (training_job) (deriv(gradwatch_job_step[5m]))"},
                "How fast each job comes further; below zero where it went back.",
            )
        )
        .with_panel(
            lines(
                "What watching costs",
                {"{{training_job}}": "max by (training_job) (gradwatch_agent_overhead_ratio)"},
                "The probe's own time as a share of the training's, on the rank where it is largest.",
                unit="percentunit",
            )
        )
        .with_panel(
            lines(
                "Collectors",
                {
                    "{{instance}}: store writable": "gradwatch_store_writable",
                    "{{instance}}: policies as their files": "gradwatch_policy_last_reload_successful",
                    "{{instance}}: series left out a second": "rate(gradwatch_series_dropped_total[5m])",
                    "{{instance}}: reports dropped a second": "sum by (instance) (rate(gradwatch_events_dropped_total[5m]))",
                },
                "The first two are 1 while all is well, the others 0.",
            )
        )
        .with_panel(
            rows(
                "Versions",
                {"collectors": "count by (instance, version) (gradwatch_build_info)"},
                "Which collector is of which version.",
                width=12,
            )
        )
    )
