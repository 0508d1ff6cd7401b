"""A job under policy, with its hosts, launchers, ranks and disk, played out record by record.

The collector's part is the real one: fold, think, orders and tasks. What the others do is what decision
0007 says that they do. The disk knows the truth about each checkpoint; the collector only what is reported.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradwatch.collector import observations as obs
from gradwatch.collector.fold import fold, tick
from gradwatch.collector.model import Changes, Event, FoldConfig, State
from gradwatch.collector.observations import Completeness, StepSource, TaskKind
from gradwatch.collector.policy.decision import Decision, Outcome
from gradwatch.collector.policy.dossier import Dossier
from gradwatch.collector.policy.reload import InForce, reload
from gradwatch.collector.recovery.orders import Order, Verb, order_for, scanner, task_for
from gradwatch.collector.recovery.think import think
from gradwatch.collector.tables import _DOSSIER, dossier_row
from tests.collector.history import NOW, batch, hello, nonfinite, progress, report

if TYPE_CHECKING:
    from gradwatch.collector.recovery.model import Entry

ROOT = "/ckpts"


@dataclass
class File:
    """A checkpoint as it is on disk."""

    step: int
    poisoned: bool
    complete: bool
    mtime: float


@dataclass
class Host:
    """A node with a launcher, its sidecar, and one rank.

    Attributes:
        command: none (no launcher), waiting, running or stopped.
        stopped_for: the order; None for a command that ended by itself.
        controls: it is a framework's controller, whose workers run elsewhere too.
        no_restart: why the framework does not start its workers again.
    """

    name: str
    launch: str = ""
    command: str = "none"
    generation: int = -1
    stopped_for: str | None = None
    exit_code: int | None = None
    said: int = 0
    reported: dict[str, float] = field(default_factory=dict)
    sidecar_said: int = 0
    ended_with: int | None = None
    controls: bool = False
    no_restart: str = ""

    @property
    def workers(self) -> str:
        """The node that its rank is on."""
        return f"{self.name}-other" if self.controls else self.name


@dataclass
class World:
    """One job.

    Attributes:
        resumed: every (generation, path) that a host started from.
        saves_when_told: a SIGTERM handler saves what it has.
        can_load: every rank loads in process; None when the script has not said how.
    """

    policy: InForce
    hosts: list[Host]
    state: State = field(default_factory=State)
    dossiers: dict[str, Dossier] = field(default_factory=dict)
    now: float = NOW
    config: FoldConfig = field(default_factory=FoldConfig)
    disk: dict[str, File] = field(default_factory=dict)
    quarantine: dict[str, File] = field(default_factory=dict)
    step: int = 0
    round: int = 0
    poisoned: bool = False
    training: int | None = None
    bad_steps: int = 0
    resumed: list[tuple[int, str | None]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    saves_when_told: bool = False
    can_load: bool | None = None
    twice: bool = False
    _bad_rounds: list[int] = field(default_factory=list)
    _rank_said: dict[str, int] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)
    _trainings: int = 0

    @classmethod
    def under(cls, text: str, hosts: int = 1) -> World:
        in_force = reload(InForce(), text.encode(), "policy.yaml")
        assert not in_force.problems, in_force.problems
        return cls(in_force, [Host(f"n{index}") for index in range(hosts)])

    # ---------------------------------------------------------------- the collector

    @property
    def dossier(self) -> Dossier:
        return self.dossiers.get("j", Dossier("j"))

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self.dossier.decisions

    def tell(self, *parts: obs.Batch | obs.Progress) -> None:
        for _ in range(2 if self.twice else 1):
            # No two reports arrive at the same time: the log of events tells them apart by it.
            self.now += 0.001
            self._take(fold(self.state, report(*parts), self.config, self.now))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self._take(tick(self.state, self.config, self.now))

    def kill_collector(self) -> None:
        """What it stored is all that is left of it."""
        self.dossiers = {
            name: _DOSSIER.validate_json(dossier_row(known)["state"]) for name, known in self.dossiers.items()
        }

    def reload(self, text: str) -> None:
        self.policy = reload(self.policy, text.encode(), "policy.yaml")

    def _take(self, changes: Changes) -> None:
        thought = think(
            self.state,
            self.dossiers,
            changes,
            policy_of=lambda _job: self.policy.policy,
            config=self.config,
            now=self.now,
        )
        self.state = thought.state
        self.events += thought.changes.events
        self.dossiers |= thought.dossiers
        self.entries += thought.entries

    # ---------------------------------------------------------------- launchers

    def launch(self, host: Host) -> None:
        """`gradwatch run` begins; one that ran there was killed, and its command with it."""
        if host.command == "running":
            self._end_ranks()
        host.launch, host.command, host.generation = f"l{next(self._ids)}", "waiting", -1
        host.stopped_for = host.exit_code = host.ended_with = None
        host.said = host.sidecar_said = 0
        host.reported = {}
        body = obs.LaunchStarted("j", 0, host.launch, host.name, 1, ("train",), "hash", host.controls)
        self._say(host, body)
        self._sidecar_says(host, obs.CheckpointRoot("j", 0, host.name, ROOT, "", host.launch))

    def obey(self, host: Host) -> Order | None:
        """Read the order, and do what it says; the order, if something was done."""
        if host.command == "none" or "j" not in self.state.jobs:
            return None
        order = order_for(self.state, self.dossier, host.launch)
        if order is None:
            return None
        if order.verb is Verb.START and host.command in {"waiting", "stopped"}:
            anew = host.stopped_for is not None or host.controls
            own = host.generation + 1 if host.command == "stopped" and anew else host.generation
            if order.generation < own:
                return None
            self._start(host, order)
        elif order.verb is Verb.STOP and host.command == "running" and host.generation == order.generation:
            self._stop(host, order.id, None)
        elif order.verb is Verb.LOAD and host.command == "running":
            return order if self._load(order) else None
        elif order.verb is Verb.HALT:
            self._end(host, 93)
        elif order.verb is Verb.RELEASE and host.command == "stopped" and host.exit_code is not None:
            self._end(host, host.exit_code)
        else:
            return None
        return order

    def crash(self, *, at_a_nan: bool = False) -> None:
        """The script ends by itself, on all hosts; it may raise at a NaN, in the very step."""
        if at_a_nan:
            self._bad_rounds.append(self.round)
            self._rank_says(0, nonfinite(self.round, step=self.step))
            self.round += 1
        for host in self.hosts:
            if host.command == "running":
                self._stop(host, None, 1)

    def kill_launcher(self, host: Host) -> None:
        """SIGKILL; its command dies with it, and nobody says so."""
        if host.command == "running":
            self._end_ranks()
        host.command = "none"

    def _start(self, host: Host, order: Order) -> None:
        host.command, host.generation, host.stopped_for, host.exit_code = (
            "running",
            order.generation,
            None,
            None,
        )
        self.resumed.append((order.generation, None if order.resume is None else order.resume.path))
        if order.resume is not None:
            # What the test is about: it is there, whole, and clean.
            file = self.disk.get(order.resume.path)
            assert file is not None, f"{order.resume.path} is not there"
            assert file.complete, f"{order.resume.path} is torn"
            assert not file.poisoned, f"{order.resume.path} is poisoned"
            assert file.step == order.resume.step
        self._say(host, obs.CommandStarted("j", order.generation, host.launch, host.no_restart))
        alike = {(one.command, one.generation) for one in self.hosts}
        if alike == {("running", order.generation)}:
            self._train(order)

    def _stop(self, host: Host, order: str | None, exit_code: int | None) -> None:
        if order is not None and self.saves_when_told and self.training is not None:
            self.save(f"{ROOT}/sigterm-{self.step}")
        self._end_ranks()
        host.command, host.stopped_for, host.exit_code = "stopped", order, exit_code
        stopped = obs.CommandStopped(
            "j", host.generation, host.launch, order or "", exit_code, restarts=host.controls
        )
        self._say(host, stopped)

    def _end(self, host: Host, exit_code: int) -> None:
        if host.command == "running":
            self._end_ranks()
        host.command, host.ended_with = "none", exit_code
        self._say(host, obs.LaunchEnded("j", host.generation, host.launch, exit_code, "command"))

    def _say(self, host: Host, body: obs.Body) -> None:
        host.said += 1
        self.tell(batch(f"launch-{host.launch}", host.said - 1, body, at=self.now))

    # ---------------------------------------------------------------- ranks

    def _load(self, order: Order) -> bool:
        """All ranks load, or one of them cannot."""
        if self.training is None or self.training >= order.generation or self.can_load is None:
            return False
        assert order.resume is not None
        for index in range(len(self.hosts)):
            error = "" if self.can_load else ("disk on fire" if index == 0 else "another rank could not load")
            self._rank_says(index, obs.Loaded(order.id, order.resume.path, order.resume.step, error))
        if self.can_load:
            self._end_ranks()
            self.resumed.append((order.generation, order.resume.path))
            self._train(order)
        return True

    def _train(self, order: Order) -> None:
        self._trainings += 1
        self.training = order.generation
        self.round, self._bad_rounds = 0, []
        self.step, self.poisoned = 0, False
        if order.resume is not None:
            file = self.disk[order.resume.path]
            self.step, self.poisoned = file.step, file.poisoned
        self._rank_said = {self._rank(index): 1 for index in range(len(self.hosts))}
        for index, host in enumerate(self.hosts):
            said = hello(
                index,
                len(self.hosts),
                generation=order.generation,
                attempt_key=f"k{self._trainings}",
                node=host.workers,
            )
            self.tell(batch(self._rank(index), 0, said, at=self.now))
            if self.can_load is not None:
                self._rank_says(index, obs.CanLoad())

    def train(self, steps: int, *, bad_rank: int | None = None) -> None:
        """So many steps; the first of them is bad on a rank."""
        for _ in range(steps):
            if self.training is None:
                return
            if bad_rank is not None:
                self.poisoned = True
            if self.poisoned:
                self._bad_rounds.append(self.round)
                who = bad_rank if bad_rank is not None else 0
                self._rank_says(who % len(self.hosts), nonfinite(self.round, step=self.step))
            bad_rank = None
            self.round += 1
            self.step += 1
            self.now += 1
            self._pass()

    def save(self, path: str, *, torn: bool = False, told: bool = True) -> None:
        """Save; a rank tells of it when it begins."""
        if self.training is None:
            return
        self.now += 1
        if told:
            self._rank_says(0, obs.CheckpointSeen(path, self.step))
        self.now += 1
        self.disk[path] = File(self.step, self.poisoned, not torn, self.now)

    def _pass(self) -> None:
        self.tell(*(self._progress(index, ended=False) for index in range(len(self.hosts))))

    def _end_ranks(self) -> None:
        if self.training is not None:
            self.tell(*(self._progress(index, ended=True) for index in range(len(self.hosts))))
        self.training = None

    def _progress(self, index: int, *, ended: bool) -> obs.Progress:
        name = self._rank(index)
        return progress(
            name,
            self.round,
            self._rank_said[name],
            step=self.step,
            bad_rounds=0,
            last_bad_round=max(self._bad_rounds, default=None),
            ended=ended,
        )

    def _rank_says(self, index: int, body: obs.Body) -> None:
        name = self._rank(index)
        self._rank_said[name] += 1
        self.tell(batch(name, self._rank_said[name] - 1, body, at=self.now))

    def _rank(self, index: int) -> str:
        return f"t{self._trainings}r{index}"

    # ---------------------------------------------------------------- sidecars

    def look_after(self) -> None:
        """The sidecar that is asked does what it is asked."""
        for host in self.hosts:
            if host.command == "none" or "j" not in self.state.jobs:
                continue
            task = task_for(self.state, self.dossier, host.launch)
            if task is None:
                continue
            assert scanner(self.state, self.dossier) == host.launch
            if task.kind is TaskKind.QUARANTINE:
                assert all(one.command != "running" for one in self.hosts), "moved while the command runs"
                moved = tuple(path for path in task.paths if path in self.disk)
                for path in moved:
                    self.quarantine[path] = self.disk.pop(path)
                    host.reported.pop(path, None)
                self._sidecar_says(host, obs.TaskDone(task.id, task.kind, "", moved))
                continue
            self._report_changes(host)
            if task.kind is TaskKind.SCAN:
                self._sidecar_says(host, obs.TaskDone(task.id, task.kind, "", ()))

    def _report_changes(self, host: Host) -> None:
        for path in [*host.reported]:
            if path not in self.disk:
                del host.reported[path]
                self._sidecar_says(host, obs.CheckpointGone(path))
        for path, file in self.disk.items():
            if host.reported.get(path) != file.mtime:
                host.reported[path] = file.mtime
                self._sidecar_says(host, _scanned(path, file))

    def _sidecar_says(self, host: Host, body: obs.Body) -> None:
        host.sidecar_said += 1
        self.tell(batch(f"sidecar-{host.launch}", host.sidecar_said - 1, body, at=self.now))

    # ---------------------------------------------------------------- together

    def settle(self, rounds: int = 12) -> None:
        """Everybody does what they are told, until nothing is left to do."""
        for _ in range(rounds):
            for host in self.hosts:
                self.obey(host)
            self.look_after()
            self.now += 0.1

    def performed(self) -> list[Decision]:
        return [one for one in self.decisions if one.outcome is Outcome.PERFORMED]


def _scanned(path: str, file: File) -> obs.CheckpointScanned:
    return obs.CheckpointScanned(
        path=path,
        layout="torch",
        completeness=Completeness.COMPLETE if file.complete else Completeness.TORN,
        reason="" if file.complete else "its end is missing",
        finite=not file.poisoned if file.complete else None,
        bad_buffers=(),
        steps=(obs.CheckpointStep(StepSource.NAME, 7),),
        modified_at=file.mtime,
        error="",
        found="fc.weight holds 3 NaN" if file.poisoned else "",
        nbytes=100,
        seconds=0.1,
    )
