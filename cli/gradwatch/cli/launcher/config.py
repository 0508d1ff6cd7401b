"""What a run is told."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gradwatch.agent.sidecar.access import Access

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The arguments of `gradwatch run`.

    Attributes:
        command: what to run; not empty.
        job: the job's name.
        state_dir: absolute.
        collector: HOST:PORT of a collector to use; None for one of our own.
        http: HOST:PORT the own collector must listen on; None for the default or a free one.
        access: what the sidecar shows and trusts; its certificate and token are the own collector's too.
        report: where the report goes; None for nowhere.
        require_watch: a job that is not wholly watched is a failure.
        drain_seconds: how long to go on shipping after the command has ended.
        quiet: say only what is wrong.
    """

    command: tuple[str, ...]
    job: str
    state_dir: Path
    collector: str | None = None
    http: str | None = None
    access: Access = dataclasses.field(default_factory=Access)
    report: Path | None = None
    require_watch: bool = False
    drain_seconds: float = 10.0
    quiet: bool = False
