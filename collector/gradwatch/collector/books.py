"""What documents tell of policy, decisions and checkpoints. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from gradwatch.collector import schema
from gradwatch.collector.policy.checkpoints import newest_good
from gradwatch.collector.policy.decision_document import as_document
from gradwatch.collector.policy.dossier import Dossier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gradwatch.collector.model import Incident, JobState
    from gradwatch.collector.policy.reload import InForce

# A job that is decided about without end shows its newest.
_DECISIONS = 200
# Before the first save there may be no folder.
_NOT_YET = "No such file or directory"


def _no_policy(_job: str) -> None:
    return None


class Books(NamedTuple):
    """What is known besides the state.

    Attributes:
        dossiers: by job.
        in_force: gives a job's policy.
    """

    dossiers: Mapping[str, Dossier]
    in_force: Callable[[str], InForce | None] = _no_policy

    def of_job(self, job: JobState) -> dict[str, Any]:
        """The fields of a job's document that are about policy."""
        dossier = self.dossiers.get(job.name, Dossier(job.name))
        recovery, halt = dossier.recovery, dossier.halt
        pin = newest_good(dossier.checkpoints)
        decisions = [as_document(one) for one in dossier.decisions if one.run == job.run]
        return {
            "decisions": decisions[-_DECISIONS:],
            "policy": _policy(self.in_force(job.name)),
            "last_good_checkpoint": None
            if pin is None
            else schema.CheckpointDocument(path=pin.path, step=pin.step),
            "recovery": None
            if recovery is None
            else schema.RecoveryDocument(
                decision=recovery.decision, phase=recovery.phase.value, hosts=list(recovery.hosts)
            ),
            "halted": halt.why if halt is not None and halt.run == job.run else None,
            "warnings": [*warnings_of(dossier), *_unreadable(job, dossier)],
        }

    def decisions_about(self, incident: Incident) -> list[dict[str, Any]]:
        """The decisions about an incident."""
        dossier = self.dossiers.get(incident.attempt.job)
        decisions = () if dossier is None else dossier.decisions
        return [as_document(one) for one in decisions if one.incident == incident.id]


NO_BOOKS = Books({})


def warnings_of(dossier: Dossier) -> list[str]:
    """What threatens the way back, in sentences."""
    good = newest_good(dossier.checkpoints)
    there = [one for one in dossier.checkpoints if not (one.gone or one.quarantined)]
    bad = [one for one in there if one.finite is False]
    lost = [one for one in dossier.checkpoints if one.gone and not one.quarantined and one.finite]
    if good is None:
        if not (lost and bad):
            return []
        text = (
            f"the last good checkpoint, {lost[-1].path}, was deleted, and what is left is not good: "
            "a rollback has nowhere to go. Keep more checkpoints (save_total_limit, save_top_k)"
        )
        return [text]
    if not any(one.step is None or one.step > good.step for one in bad):
        return []
    text = (
        f"checkpoints newer than the newest good one, {good.path} (step {good.step}), hold non-finite "
        "values: a rotation that deletes the oldest will take the good one too. Copy it, or keep more"
    )
    return [text]


def _unreadable(job: JobState, dossier: Dossier) -> list[str]:
    """Why no checkpoint can be looked at, by those that are there to do it."""
    roots = [root for root in dossier.roots if root.launch in job.launches]
    living = [root for root in roots if job.launches[root.launch].ended_at is None]
    if not all(root.error for root in living):
        return []
    errors = {f"{root.error}, on {root.node}" for root in living if not root.error.endswith(_NOT_YET)}
    return [f"a rollback has nowhere to go: {'; '.join(sorted(errors))}"] if errors else []


def _policy(in_force: InForce | None) -> schema.PolicyDocument | None:
    if in_force is None:
        return None
    return schema.PolicyDocument(
        hash=in_force.hash,
        mode=None if in_force.policy is None else in_force.policy.mode.value,
        problems=[str(problem) for problem in in_force.problems],
    )
