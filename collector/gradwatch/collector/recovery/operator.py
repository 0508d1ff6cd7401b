"""A rollback that an operator asks for. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.policy.checkpoints import ANY_STEP, choose, newer_than
from gradwatch.collector.policy.decision import Decision, Evidence, Outcome, decision_id
from gradwatch.collector.policy.document import policy_hash
from gradwatch.collector.policy.effects import effect_of
from gradwatch.collector.policy.model import Action

if TYPE_CHECKING:
    from gradwatch.collector.model import JobState
    from gradwatch.collector.policy.dossier import Dossier
    from gradwatch.collector.policy.model import Policy


def operator_rollback(
    job: JobState, dossier: Dossier, policy: Policy | None, who: str, now: float
) -> Decision | str:
    """The decision to go back to the newest good checkpoint; or why it cannot be taken.

    The policy's budgets do not bind an operator; that there is a policy, with a root, does.

    Args:
        job: to be rolled back.
        dossier: the job's.
        policy: that is in force for it.
        who: the operator.
        now: in seconds since the epoch.
    """
    if policy is None or policy.checkpoints is None:
        return "the job has no policy with a section `checkpoints`: nobody knows where its checkpoints are"
    if dossier.recovery is not None:
        return f"decision {dossier.recovery.decision} rolls it back already"
    if all(launch.ended_at is not None for launch in job.launches.values()):
        return "no `gradwatch run` of the job is there to perform it"
    choice = choose(dossier.checkpoints, ANY_STEP)
    target = choice.target
    if target is None:
        return f"there is no good checkpoint: {choice.why_none}"
    quarantine = newer_than(dossier.checkpoints, target)
    number = sum(one.incident is None for one in dossier.decisions)
    return Decision(
        id=decision_id(f"{job.name}\0operator\0{number}", None, job.generation),
        job=job.name,
        run=job.run,
        generation=job.generation,
        incident=None,
        action=Action.ROLLBACK,
        outcome=Outcome.PENDING,
        rule=None,
        reason=f"{who} asked for it",
        effect=effect_of(Action.ROLLBACK, target, quarantine, policy.rollback.quarantine, dry=False),
        policy_hash=policy_hash(policy),
        at=now,
        evidence=Evidence({}),
        checkpoint=target,
        quarantine=quarantine,
    )
