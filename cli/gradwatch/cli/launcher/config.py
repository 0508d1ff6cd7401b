"""What a run is told."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gradwatch.agent.sidecar.access import Access
from gradwatch.cli.launcher.lifecycle import Rules

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.cli.launcher.policy_file import RunPolicy


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The arguments of `gradwatch run`.

    Attributes:
        command: what to run; not empty.
        job: the job's name.
        state_dir: absolute.
        collector: HOST:PORT of a collector to use; None for one of our own.
        http: HOST:PORT the own collector must listen on; None for the default or a free one.
        webhook: URL that the own collector tells of incidents; None for none.
        webhook_secret_file: signs that.
        access: what the sidecar shows and trusts; its certificate and token are the own collector's too.
        identities: the own collector's file of those who may look, besides; None for none.
        policy: the job's, read and checked; None for none.
        rules: how the command is stopped and started; whether it obeys follows from the policy.
        replica_check_every: rounds between two checksums of the parameters; 0 for never, None by default.
        report: where the report goes; None for nowhere.
        sidecar: one is started here; else one runs beside us, on the same state folder.
        require_watch: a job that is not wholly watched is a failure.
        autopsy: bad micro-batches are replayed.
        drain_seconds: how long to go on shipping after the command has ended.
        quiet: say only what is wrong.
    """

    command: tuple[str, ...]
    job: str
    state_dir: Path
    collector: str | None = None
    http: str | None = None
    webhook: str | None = None
    webhook_secret_file: Path | None = None
    access: Access = dataclasses.field(default_factory=Access)
    identities: Path | None = None
    policy: RunPolicy | None = None
    rules: Rules = dataclasses.field(default_factory=Rules)
    replica_check_every: int | None = None
    report: Path | None = None
    sidecar: bool = True
    require_watch: bool = False
    autopsy: bool = True
    drain_seconds: float = 10.0
    quiet: bool = False

    @property
    def own_collector(self) -> bool:
        """Whether a collector is started here, unless one runs on the state folder already."""
        return self.sidecar and self.collector is None

    def rules_when(self, *, watched: bool) -> Rules:
        """The rules that hold: nobody can give orders to a run that is not watched."""
        return dataclasses.replace(self.rules, obeys=watched and self.policy is not None)
