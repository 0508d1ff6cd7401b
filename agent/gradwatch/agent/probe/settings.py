"""What the launcher tells a watched process, through the environment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.agent.probe.guard import GuardPolicy, reads_out_every_step

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Settings:
    """The probe's settings; see `docs/architecture.md` for who sets them."""

    spool: Path
    job: str
    generation: int
    resume_step: int | None
    guard: GuardPolicy | None
    checkpoints_root: Path | None
    autopsy: bool = True
    # On a device: each update attempt waits until its gradients have been read out.
    read_out_every_step: bool = False
    # Rounds between two checksums of the parameters; 0 for none.
    replica_check_every: int = 100
    # Of the checkpoint that the job was told to go back to.
    resume_path: str | None = None

    @property
    def holds_weights(self) -> bool:
        """Whether those of a device are, as a rule, still as they were when a fault is read out."""
        return self.guard is not None or self.read_out_every_step

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings | None:
        """Read them; None when the process is not watched.

        Raises:
            ValueError: a number in the environment is not one, or the guard's policy cannot be read.
        """
        spool = environ.get("GRADWATCH_SPOOL")
        if not spool:
            return None
        resume_step = environ.get("GRADWATCH_RESUME_STEP")
        root = environ.get("GRADWATCH_CHECKPOINTS_ROOT")
        asked = json.loads(environ.get("GRADWATCH_GUARD") or "{}")
        return cls(
            spool=Path(spool),
            job=environ.get("GRADWATCH_JOB") or "unnamed",
            generation=int(environ.get("GRADWATCH_GENERATION") or 0),
            resume_step=int(resume_step) if resume_step else None,
            guard=GuardPolicy.asked(asked),
            read_out_every_step=reads_out_every_step(asked),
            checkpoints_root=Path(root) if root else None,
            replica_check_every=int(environ.get("GRADWATCH_REPLICA_CHECK_EVERY") or 100),
            resume_path=environ.get("GRADWATCH_RESUME_PATH") or None,
            autopsy=environ.get("GRADWATCH_AUTOPSY", "").lower() not in {"off", "no", "false", "0"},
        )
