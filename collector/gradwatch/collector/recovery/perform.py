"""Perform what is decided, a step at a time: `(state, dossier, policy, now)` gives how things stand. Pure.

Docs: decision 0007. Each step rests on what launchers and sidecars have said, never on that they were told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.model import CommandState
from gradwatch.collector.policy.checkpoints import ANY_STEP, choose, newer_than
from gradwatch.collector.policy.decision import Outcome, conclude
from gradwatch.collector.policy.dossier import with_decision
from gradwatch.collector.policy.effects import effect_of
from gradwatch.collector.policy.model import Action, Quarantine
from gradwatch.collector.policy.refusals import refusal_to_perform
from gradwatch.collector.policy.sentences import duration
from gradwatch.collector.recovery import ledger
from gradwatch.collector.recovery.model import Entry, Halt, Phase, Recovery
from gradwatch.collector.recovery.orders import scanner
from gradwatch.collector.runs import commanding

if TYPE_CHECKING:
    from gradwatch.collector.model import JobState, Launch, State
    from gradwatch.collector.policy.decision import Decision
    from gradwatch.collector.policy.dossier import Dossier
    from gradwatch.collector.policy.model import Policy

# So long the launchers of a job are waited for, once the first has stopped.
LAUNCHERS_SECONDS = 120.0
_SHOWN = 4


class Step(NamedTuple):
    """How things stand after a step.

    Attributes:
        generation: of the job from now on.
        entries: for the audit trail.
    """

    dossier: Dossier
    generation: int
    entries: tuple[Entry, ...] = ()


def step(state: State, dossier: Dossier, policy: Policy | None, now: float) -> Step | None:
    """The next step that is due; None when there is none.

    Args:
        state: the collector's.
        dossier: of the job.
        policy: that is in force for it; None when there is none any more.
        now: in seconds since the epoch.
    """
    job = state.jobs[dossier.job]
    performing = _Performing(state, job, dossier, policy, now)
    if dossier.recovery is not None:
        return performing.go_on(dossier.recovery)
    pending = next((one for one in dossier.decisions if one.outcome is Outcome.PENDING), None)
    return None if pending is None else performing.begin(pending)


class _Performing(NamedTuple):
    """One job at one moment."""

    state: State
    job: JobState
    dossier: Dossier
    policy: Policy | None
    now: float

    # ---------------------------------------------------------------- begin

    def begin(self, decision: Decision) -> Step | None:
        if decision.action is Action.HALT:
            return self._halt(decision)
        refused = (
            refusal_to_perform(self.state, self.dossier, decision)
            or self._no_launcher()
            or self._no_restart()
        )
        if refused is not None:
            return self._concluded(decision, Outcome.REFUSED, refused)
        # A script that loads in process cannot be told to leave batches out, and is given no URL.
        remote = self.policy is not None and self.policy.checkpoints and self.policy.checkpoints.is_remote
        if self._all_can_load() and not decision.skip_batches and not remote:
            recovery = Recovery(
                decision.id, decision.generation, (), Phase.SCANNING, self.now, in_process=True
            )
            entry = self._entry("looking", decision, "looking at the checkpoints; the command runs on")
            return self._moved(recovery, entry)
        return self._stop(decision)

    def _stop(self, decision: Decision, *why: Entry) -> Step:
        hosts = self._hosts(decision.generation)
        recovery = Recovery(decision.id, decision.generation, hosts)
        entry = self._entry(
            "stopping", decision, f"stopping generation {decision.generation} on {_and(hosts)}"
        )
        return self._moved(recovery, *why, entry)

    def _all_can_load(self) -> bool:
        """Whether all ranks that train have said that they can, and nothing is stopped."""
        loaders, current = self.dossier.loaders, self.job.current
        if loaders is None or current is None or loaders.attempt != current:
            return False
        runs = all(launch.command is CommandState.RUNNING for launch in commanding(self.job))
        return runs and len(loaders.ranks) == self.state.attempts[current].world_size

    def _halt(self, decision: Decision) -> Step | None:
        """Order it, and see it through until every launcher has ended."""
        if self.dossier.halt is None or self.dossier.halt.decision != decision.id:
            refused = refusal_to_perform(self.state, self.dossier, decision) or self._no_launcher()
            if refused is not None:
                return self._concluded(decision, Outcome.REFUSED, refused)
            halt = Halt(decision.id, self.job.run, decision.reason)
            entry = self._entry("halting", decision, decision.reason)
            return Step(replace(self.dossier, halt=halt), self.job.generation, (entry,))
        if commanding(self.job) and self.dossier.halt.run == self.job.run:
            return None
        return self._concluded(decision, Outcome.PERFORMED, "every launcher has ended")

    def _no_launcher(self) -> str | None:
        living = commanding(self.job)
        if not living:
            return "no `gradwatch run` of this job is there to perform it"
        deaf = sorted(str(launch.node) for launch in living if not launch.obeys)
        return f"the launcher on {_and(deaf)} was given no --policy, and obeys no order" if deaf else None

    def _no_restart(self) -> str | None:
        return next((launch.no_restart for launch in commanding(self.job) if launch.no_restart), None)

    def _hosts(self, generation: int) -> tuple[str, ...]:
        """Those whose ranks said hello in that generation, and those with a launcher.

        A controller of all workers answers for every host.
        """
        launches = commanding(self.job)
        nodes = {launch.node for launch in launches}
        if any(launch.whole_job for launch in launches):
            return tuple(sorted(str(node) for node in nodes))
        for attempt in self.job.attempts:
            if attempt.generation == generation:
                for incarnation in self.state.attempts[attempt].ranks.values():
                    journal = self.state.journals[incarnation]
                    if journal.rank is not None and journal.run == self.job.run:
                        nodes.add(journal.rank.hello.node)
        return tuple(sorted(str(node) for node in nodes))

    # ---------------------------------------------------------------- go on

    def go_on(self, recovery: Recovery) -> Step | None:
        decision = next(one for one in self.dossier.decisions if one.id == recovery.decision)
        if recovery.phase is Phase.STOPPING:
            return self._await_launchers(recovery, decision)
        if recovery.in_process and not all(
            one.command is CommandState.RUNNING for one in commanding(self.job)
        ):
            return self._fall_back(decision, "a command has ended meanwhile")
        if recovery.phase is Phase.SCANNING:
            return self._await_scan(recovery, decision)
        if recovery.phase is Phase.LOADING:
            return self._await_loads(recovery, decision)
        return self._await_quarantine(recovery, decision)

    def _fall_back(self, decision: Decision, why: str) -> Step:
        entry = self._entry("not loaded", decision, f"{why}: the job is restarted instead")
        return self._stop(decision, entry)

    def _await_loads(self, recovery: Recovery, decision: Decision) -> Step | None:
        if recovery.error is not None:
            return self._fall_back(decision, recovery.error)
        if set(recovery.loaded) >= set(range(self._world_size(recovery))):
            return self._restart(replace(decision, in_process=True), decision.generation + 1)
        if recovery.waiting_since is not None and self.now - recovery.waiting_since >= LAUNCHERS_SECONDS:
            why = f"not every rank has loaded the checkpoint within {duration(LAUNCHERS_SECONDS)}"
            return self._fall_back(decision, why)
        return None

    def _world_size(self, recovery: Recovery) -> int:
        """Of the generation that goes back."""
        attempts = (self.state.attempts[id_] for id_ in reversed(self.job.attempts))
        return next(one.world_size for one in attempts if one.id.generation == recovery.generation)

    def _await_launchers(self, recovery: Recovery, decision: Decision) -> Step | None:
        ready = {launch.node for launch in commanding(self.job) if launch.obeys and _is_still(launch)}
        missing = [host for host in recovery.hosts if host not in ready]
        running = [launch for launch in commanding(self.job) if not _is_still(launch)]
        if not missing and not running:
            moved = replace(recovery, phase=Phase.SCANNING, waiting_since=self.now)
            entry = self._entry("stopped", decision, f"nothing runs any more on {_and(recovery.hosts)}")
            return self._moved(moved, entry)
        if recovery.waiting_since is None:
            return self._moved(replace(recovery, waiting_since=self.now)) if ready else None
        if self.now - recovery.waiting_since < LAUNCHERS_SECONDS or not commanding(self.job):
            return None
        where = missing or [str(launch.node) for launch in running]
        return self._failed(
            decision,
            f"no launcher on {_and(where)} has stopped its command within {duration(LAUNCHERS_SECONDS)} "
            "after the first had",
        )

    def _await_scan(self, recovery: Recovery, decision: Decision) -> Step | None:
        if recovery.error is not None:
            return self._failed(decision, f"the checkpoints cannot be looked at: {recovery.error}")
        if not recovery.scanned:
            why_none = self._why_no_scanner(recovery)
            return None if why_none is None else self._failed(decision, why_none)
        margin = 0 if self.policy is None else self.policy.rollback.margin_steps
        mode = Quarantine.MOVE if self.policy is None else self.policy.rollback.quarantine
        if any(launch.whole_job for launch in commanding(self.job)):
            # A framework that keeps a register of its checkpoints fails when one of them is not there.
            mode = Quarantine.LEDGER
        known = self.dossier.checkpoints
        # An operator names no bad step: the newest good one is meant.
        first_bad = ANY_STEP if decision.first_bad_step is None else decision.first_bad_step
        choice = choose(known, first_bad, margin)
        if choice.target is None:
            why = f"looked at again, there is no good checkpoint: {choice.why_none}"
            return self._failed(decision, why)
        newer = newer_than(known, choice.target)
        if mode is Quarantine.MOVE and not recovery.in_process:
            # What was only marked while the command ran is moved now.
            newer += tuple(one.path for one in known if one.quarantined and not one.gone)
        reason = decision.reason
        if decision.checkpoint is not None and choice.target != decision.checkpoint:
            reason += f"; looked at again, {choice.target.path} was the newest good checkpoint"
        decision = replace(
            decision,
            checkpoint=choice.target,
            quarantine=newer,
            effect=effect_of(Action.ROLLBACK, choice.target, newer, mode, dry=False),
            reason=reason,
        )
        dossier = with_decision(self.dossier, decision)
        if recovery.in_process:
            # Nothing is moved while the command runs.
            dossier = ledger.set_aside(dossier, newer, moved=False)
            moved = replace(recovery, phase=Phase.LOADING, waiting_since=self.now)
            entry = self._entry("loading", decision, f"all ranks load {choice.target.path}")
            return self._replaced(dossier)._moved(moved, entry)
        if mode is Quarantine.LEDGER or not newer:
            dossier = ledger.set_aside(dossier, newer, moved=False)
            return self._replaced(dossier)._restart(decision)
        moved = replace(recovery, phase=Phase.QUARANTINING)
        entry = self._entry("quarantining", decision, f"setting aside {_and(newer)}")
        return self._replaced(dossier)._moved(moved, entry)

    def _await_quarantine(self, recovery: Recovery, decision: Decision) -> Step | None:
        if recovery.error is not None:
            return self._failed(decision, f"checkpoints cannot be set aside: {recovery.error}")
        if not recovery.set_aside:
            return None
        dossier = ledger.set_aside(self.dossier, decision.quarantine, moved=True)
        return self._replaced(dossier)._restart(decision)

    def _restart(self, decision: Decision, generation: int | None = None) -> Step:
        """The job goes on, in the next generation unless told which."""
        generation = self.job.generation + 1 if generation is None else generation
        target = decision.checkpoint
        where = "" if target is None else f", from {target.path} of step {target.step}"
        why = f"generation {generation} starts{where}"
        done = conclude(decision, Outcome.PERFORMED, why)
        dossier = replace(with_decision(self.dossier, done), recovery=None)
        return Step(dossier, generation, (self._entry("performed", done, why),))

    # ---------------------------------------------------------------- helpers

    def _why_no_scanner(self, recovery: Recovery) -> str | None:
        """Why nobody will look at the checkpoints; None while somebody does, or may yet."""
        living = {launch.id for launch in self.job.launches.values() if launch.ended_at is None}
        if not living or scanner(self.state, self.dossier) is not None:
            return None
        roots = [root for root in self.dossier.roots if root.launch in living]
        if {root.launch for root in roots} == living:
            errors = "; ".join(sorted(f"{root.root} on {root.node}: {root.error}" for root in roots))
            return f"the checkpoints cannot be looked at: {errors}"
        since = recovery.waiting_since
        if since is not None and self.now - since < LAUNCHERS_SECONDS:
            return None
        limit = duration(LAUNCHERS_SECONDS)
        return f"no sidecar of the job has said within {limit} that it can look at its checkpoints"

    def _failed(self, decision: Decision, why: str) -> Step:
        """There is nothing to go on with: the job ends."""
        failed = conclude(decision, Outcome.FAILED, why)
        halt = Halt(decision.id, self.job.run, why)
        dossier = replace(with_decision(self.dossier, failed), recovery=None, halt=halt)
        return Step(dossier, self.job.generation, (self._entry("failed", failed, why),))

    def _concluded(self, decision: Decision, outcome: Outcome, why: str) -> Step:
        done = conclude(decision, outcome, why)
        entry = self._entry(outcome.value, done, why)
        return Step(with_decision(self.dossier, done), self.job.generation, (entry,))

    def _moved(self, recovery: Recovery, *entries: Entry) -> Step:
        return Step(replace(self.dossier, recovery=recovery), self.job.generation, entries)

    def _replaced(self, dossier: Dossier) -> _Performing:
        return _Performing(self.state, self.job, dossier, self.policy, self.now)

    def _entry(self, what: str, decision: Decision, text: str) -> Entry:
        return Entry(self.job.name, self.now, what, decision.id, text)


def _is_still(launch: Launch) -> bool:
    return launch.command in {CommandState.WAITING, CommandState.STOPPED}


def _and(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown or "no host"
