"""Histories of jobs, told as what their journals and progress files say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gradwatch.collector import observations as obs
from gradwatch.collector.fold import fold, tick
from gradwatch.collector.model import Changes, FoldConfig, Incident, JobState, RankState, State, apply

NOW = 1_800_000_000.0
# Phases in which a gradient can go bad; an update changes weights.
GRADIENT_PHASES = [phase for phase in obs.Phase if phase is not obs.Phase.UPDATE]


def hello(rank: int, world_size: int = 2, **changes: object) -> obs.Hello:
    known = obs.Hello(
        job="j",
        generation=0,
        attempt_key="k",
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        node=f"n{rank}",
        pid=100 + rank,
        device="cpu",
        device_id=None,
        device_name=None,
        torch_version="2.13.0",
        probe_version="0.1.0",
        framework="ddp",
        duplicate_claim=False,
    )
    return replace(known, **changes)


def gradient(parameter: str = "a.weight", position: int | None = 0, **changes: object) -> obs.BadGradient:
    known = obs.BadGradient(
        parameter=parameter,
        module=parameter.rpartition(".")[0],
        module_class="Linear",
        value=obs.Value.NAN,
        count=1,
        numel=10,
        dtype="torch.float32",
        backward_position=position,
    )
    return replace(known, **changes)


def nonfinite(
    round_: int, *gradients: obs.BadGradient, step: int | None = None, **changes: object
) -> obs.NonFinite:
    known = obs.NonFinite(
        root=0,
        round=round_,
        step=round_ if step is None else step,
        microbatch=0,
        phase=None,
        bucket=0,
        gradients=gradients or (gradient(),),
        gradients_total=len(gradients) or 1,
        batch=None,
        source="ddp-bucket",
    )
    return replace(known, **changes)


def progress(incarnation: str, round_: int, records: int, **changes: object) -> obs.Progress:
    known = obs.Progress(
        incarnation=incarnation,
        round=round_,
        step=round_,
        last_bad_round=None,
        bad_rounds=0,
        reduced_round=round_,
        probe_seconds=0.01 * round_,
        train_seconds=1.0 * round_,
        ended=False,
        malformed_lines=0,
        journal_records=records,
    )
    return replace(known, **changes)


def launch_started(launch: str = "l", node: str = "n0", **changes: object) -> obs.LaunchStarted:
    known = obs.LaunchStarted(job="j", generation=0, launch=launch, node=node, pid=1, command=("python",))
    return replace(known, **changes)


def launch_ended(launch: str = "l", exit_code: int = 0, ended_by: str = "command") -> obs.LaunchEnded:
    return obs.LaunchEnded(job="j", generation=0, launch=launch, exit_code=exit_code, ended_by=ended_by)


def batch(incarnation: str, first_seq: int, *bodies: obs.Body, at: float = NOW) -> obs.Batch:
    return obs.Batch(
        incarnation,
        tuple(obs.Record(first_seq + index, at, body) for index, body in enumerate(bodies)),
    )


def report(*parts: obs.Batch | obs.Progress) -> obs.Report:
    return obs.Report(
        tuple(part for part in parts if isinstance(part, obs.Batch)),
        tuple(part for part in parts if isinstance(part, obs.Progress)),
    )


@dataclass
class Told:
    """A state that is told reports; time stands still until it is let pass."""

    state: State = field(default_factory=State)
    now: float = NOW
    config: FoldConfig = field(default_factory=FoldConfig)
    logged: set[tuple[str, int]] = field(default_factory=set)

    def tell(self, *parts: obs.Batch | obs.Progress) -> Told:
        changes = fold(self.state, report(*parts), self.config, self.now)
        self._keep(changes)
        return self

    def wait(self, seconds: float) -> Told:
        self.now += seconds
        self._keep(tick(self.state, self.config, self.now))
        return self

    def _keep(self, changes: Changes) -> None:
        for event in changes.events:
            key = (event.incarnation, event.seq)
            assert key not in self.logged, f"{event} is logged twice"
            self.logged.add(key)
        self.state = apply(self.state, changes)

    def hellos(self, world_size: int, **changes: object) -> Told:
        return self.tell(
            *(batch(f"r{rank}", 0, hello(rank, world_size, **changes)) for rank in range(world_size))
        )

    @property
    def job(self) -> JobState:
        return self.state.jobs["j"]

    @property
    def incidents(self) -> list[Incident]:
        return sorted(self.state.incidents.values(), key=lambda one: (one.attempt, one.evidence.first_round))

    @property
    def incident(self) -> Incident:
        (only,) = self.incidents
        return only

    def rank(self, incarnation: str) -> RankState:
        rank = self.state.journals[incarnation].rank
        assert rank is not None
        return rank
