"""What launchers and sidecars of a job are to do now: a function of how things are. Pure.

It says how things should be, so the same again changes nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gradwatch.collector.model import CommandState, Status
from gradwatch.collector.observations import TaskKind
from gradwatch.collector.policy.checkpoints import newest_good
from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.model import Action
from gradwatch.collector.recovery.model import Phase
from gradwatch.collector.runs import commanding

if TYPE_CHECKING:
    from gradwatch.collector.model import JobState, Launch, State
    from gradwatch.collector.policy.decision import Decision, Target
    from gradwatch.collector.policy.dossier import Dossier
    from gradwatch.collector.recovery.model import Recovery


class Verb(str, enum.Enum):
    """What a launcher is to do."""

    START = "start"
    STOP = "stop"
    LOAD = "load"
    HALT = "halt"
    RELEASE = "release"


@dataclass(frozen=True, slots=True)
class Order:
    """What one launcher is to do.

    Attributes:
        id: the decision's; empty for a first start.
        generation: to be started, or to be stopped.
        resume: what to start from.
    """

    id: str
    job: str
    launch: str
    generation: int
    verb: Verb
    reason: str
    resume: Target | None = None
    skip_batches: int = 0
    exclude_node: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """What one sidecar is to do with the job's checkpoints."""

    id: str
    job: str
    kind: TaskKind
    paths: tuple[str, ...] = ()
    reason: str = ""


def order_for(state: State, dossier: Dossier, launch_id: str) -> Order | None:
    """The order for a launch; None when it goes on as it is."""
    job = state.jobs[dossier.job]
    launch = job.launches.get(launch_id)
    if launch is None or not launch.obeys or launch not in commanding(job):
        return None
    if dossier.halt is not None and dossier.halt.run == job.run:
        halt = dossier.halt
        return Order(halt.decision, job.name, launch_id, launch.generation, Verb.HALT, halt.why)
    if dossier.recovery is not None:
        return _recovering(dossier, dossier.recovery, job, launch)
    behind = launch.command is CommandState.STOPPED and job.generation > launch.generation
    if behind and not launch.stopped_for:
        # It ended by itself after its ranks had gone back without a restart.
        last = _last_rollback(dossier)
        behind = last is not None and not last.in_process
    if launch.command is CommandState.WAITING or behind:
        return _start(dossier, job, launch_id)
    crashed = launch.command is CommandState.STOPPED and not launch.stopped_for
    return _after_crash(dossier, job, launch) if crashed and not _is_open(state, job, dossier) else None


def task_for(state: State, dossier: Dossier, launch_id: str) -> Task | None:
    """The task for the sidecar of a launch; None when another one looks after the checkpoints."""
    job = state.jobs[dossier.job]
    if scanner(state, dossier) != launch_id:
        return None
    recovery = dossier.recovery
    if recovery is None or recovery.phase in {Phase.STOPPING, Phase.LOADING}:
        return Task("", job.name, TaskKind.WATCH)
    if recovery.phase is Phase.SCANNING:
        return Task(recovery.decision, job.name, TaskKind.SCAN)
    decision = next(one for one in dossier.decisions if one.id == recovery.decision)
    return Task(recovery.decision, job.name, TaskKind.QUARANTINE, decision.quarantine, decision.reason)


def scanner(state: State, dossier: Dossier) -> str | None:
    """The launch whose sidecar looks after the checkpoints: on rank 0's node, if that one can."""
    job = state.jobs[dossier.job]
    able = [
        root
        for root in dossier.roots
        if not root.error and root.launch in job.launches and job.launches[root.launch].ended_at is None
    ]
    node = _node_of_rank_0(state, job)
    able.sort(key=lambda root: (root.node != node, root.node, root.launch))
    return able[0].launch if able else None


def _recovering(dossier: Dossier, recovery: Recovery, job: JobState, launch: Launch) -> Order | None:
    decision = next(one for one in dossier.decisions if one.id == recovery.decision)
    if not recovery.in_process:
        # A launcher knows the generation that it has started; ranks may have gone on to another since.
        return Order(decision.id, job.name, launch.id, launch.generation, Verb.STOP, decision.reason)
    if recovery.phase is not Phase.LOADING:
        return None
    generation = recovery.generation + 1
    return Order(
        decision.id,
        job.name,
        launch.id,
        generation,
        Verb.LOAD,
        decision.reason,
        decision.checkpoint,
        decision.skip_batches,
    )


def _after_crash(dossier: Dossier, job: JobState, launch: Launch) -> Order:
    """Nothing is due about a command that has ended by itself: it may go its own way."""
    if launch.restarts:
        return replace(_start(dossier, job, launch.id), generation=launch.generation + 1)
    return Order("", job.name, launch.id, launch.generation, Verb.RELEASE, "nothing is due")


def _start(dossier: Dossier, job: JobState, launch_id: str) -> Order:
    pin = newest_good(dossier.checkpoints)
    order = Order("", job.name, launch_id, job.generation, Verb.START, "", pin)
    last = _last_rollback(dossier)
    if last is None or last.checkpoint != pin:
        return order
    return replace(
        order,
        id=last.id,
        reason=last.reason,
        skip_batches=last.skip_batches,
        exclude_node=last.exclude_node,
    )


def _last_rollback(dossier: Dossier) -> Decision | None:
    """The newest that was performed."""
    return next(
        (
            one
            for one in reversed(dossier.decisions)
            if one.action is Action.ROLLBACK and one.outcome is Outcome.PERFORMED
        ),
        None,
    )


def _is_open(state: State, job: JobState, dossier: Dossier) -> bool:
    """Whether something may yet be decided about the attempt that trains, or did until now."""
    if job.current is None:
        return False
    attempt = state.attempts[job.current]
    if attempt.pending:
        return True
    journals = (state.journals[incarnation] for incarnation in attempt.ranks.values())
    for journal in journals:
        rank = journal.rank
        if rank is not None and not (rank.progress is not None and rank.progress.ended):
            return True
    decided = {one.incident for one in dossier.decisions}
    return any(
        state.incidents[id_].status is Status.SUSPECTED and id_ not in decided for id_ in attempt.incidents
    )


def _node_of_rank_0(state: State, job: JobState) -> str | None:
    if job.current is None:
        return None
    incarnation = state.attempts[job.current].ranks.get(0)
    rank = None if incarnation is None else state.journals[incarnation].rank
    return None if rank is None else rank.hello.node
