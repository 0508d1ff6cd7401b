"""One job: how far it is, what went wrong, what was done, and where it could go back to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.dashboards.parts import annotation, board, figure, lines, rows, variable

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.dashboard import Dashboard

JOB = 'training_job="$training_job"'


def job() -> Dashboard:
    """The dashboard of one job."""
    return _going_back(_trouble(_progress(_empty())))


def _empty() -> Dashboard:
    return (
        board("gradwatch-job", "Gradwatch / Job", "One job: how far it is, and what went wrong on the way.")
        .with_variable(variable("training_job", "Job", "label_values(gradwatch_job_running, training_job)"))
        .annotation(
            annotation(
                "Incidents", "red", f"sum by (cause) (increase(gradwatch_incidents_total{{{JOB}}}[2m])) > 0"
            )
        )
        .annotation(
            annotation(
                "Rollbacks",
                "blue",
                f'sum by (outcome) (increase(gradwatch_rollbacks_total{{{JOB},outcome="performed"}}[2m])) > 0',
            )
        )
    )


def _progress(board_: Dashboard) -> Dashboard:
    return (
        board_.with_panel(
            figure("Step", f"max(gradwatch_job_step{{{JOB}}})", "The newest step that a rank has reached.")
        )
        .with_panel(
            figure(
                "Behind by",
                f"max(gradwatch_job_step{{{JOB}}}) - min(gradwatch_job_slowest_step{{{JOB}}})",
                "Steps between the rank that is ahead and the one that is behind.",
            )
        )
        .with_panel(
            figure(
                "Silent for",
                f"max(gradwatch_job_silent_seconds{{{JOB}}}) or 0 * max(gradwatch_job_running{{{JOB}}})",
                "Since any rank last came further; 0 for a job that has ended.",
                unit="s",
                bad_above=600,
            )
        )
        .with_panel(
            figure(
                "Ranks",
                f"sum by (state) (gradwatch_job_ranks{{{JOB}}})",
                "Ranks of the world: watched, ended, or missing.",
                legend="{{state}}",
            )
        )
        .with_panel(
            figure(
                "Generation",
                f"max(gradwatch_job_generation{{{JOB}}})",
                "How often the job was started again.",
            )
        )
        .with_panel(
            figure(
                "Overhead",
                f"max(gradwatch_agent_overhead_ratio{{{JOB}}})",
                "The probe's own time as a share of the training's.",
                unit="percentunit",
                bad_above=0.05,
            )
        )
        .with_panel(
            lines(
                "Step",
                {
                    "ahead": f"max(gradwatch_job_step{{{JOB}}})",
                    "behind": f"min(gradwatch_job_slowest_step{{{JOB}}})",
                    "newest good checkpoint": f"max(gradwatch_last_good_checkpoint_step{{{JOB}}})",
                },
                "Where the job is, and where it could go back to. A fall is a rollback.",
            )
        )
    )


def _trouble(board_: Dashboard) -> Dashboard:
    return (
        board_.with_panel(
            lines(
                "Incidents",
                {"{{cause}}": f"sum by (cause) (gradwatch_incidents_total{{{JOB}}}) > 0"},
                "Confirmed incidents by cause; each point's exemplar is the incident's id.",
                exemplars=True,
            )
        )
        .with_panel(
            lines(
                "Non-finite gradients, by rank",
                {
                    "rank {{rank}} on {{host}}": f"topk(20, sum by (rank, host) (gradwatch_rank_nonfinite_events_total{{{JOB}}}))"
                },
                "Reports of non-finite local gradients: the first rank, and those that it contaminated.",
            )
        )
        .with_panel(
            lines(
                "Non-finite gradients, by cause",
                {"{{cause}}": f"sum by (cause) (rate(gradwatch_nonfinite_events_total{{{JOB}}}[5m]))"},
                "Reports a second. `loss_scale` is the normal work of a GradScaler.",
                unit="cps",
            )
        )
        .with_panel(
            lines(
                "Early warnings and what was lost",
                {
                    "gradients exploding": f'sum(increase(gradwatch_warnings_total{{{JOB},kind="exploding"}}[5m]))',
                    "dropped, {{reason}}": f"sum by (reason) (increase(gradwatch_events_dropped_total{{{JOB}}}[5m]))",
                    "processes not watched": f"max(gradwatch_job_unwatched_processes{{{JOB}}})",
                },
                "In the last five minutes.",
            )
        )
    )


def _going_back(board_: Dashboard) -> Dashboard:
    return (
        board_.with_panel(
            lines(
                "Decisions",
                {"{{action}}, {{outcome}}": f"sum by (action, outcome) (gradwatch_decisions_total{{{JOB}}})"},
                "What policy or an operator decided, and what became of it.",
            )
        )
        .with_panel(
            lines(
                "Checkpoints",
                {"{{verdict}}": f"sum by (verdict) (gradwatch_checkpoints{{{JOB}}})"},
                "Those that are there: good, bad (non-finite), not known, in quarantine.",
            )
        )
        .with_panel(
            lines(
                "Age of the newest good checkpoint",
                {"age": f"time() - max(gradwatch_last_good_checkpoint_timestamp_seconds{{{JOB}}})"},
                "So much work a rollback would lose.",
                unit="s",
            )
        )
        .with_panel(
            rows(
                "Rollbacks",
                {"rollbacks": f"sum by (outcome) (gradwatch_rollbacks_total{{{JOB}}})"},
                "By what became of them.",
                width=12,
            )
        )
    )
