"""The job as the collector's status document describes it: the launcher's one reader of it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class JobView:
    """What the launcher needs to know of its job.

    Attributes:
        generations: how many generations the job has had.
        attempts: how many attempts the present generation has had.
        world_size: None until a rank has said so.
        watched: how many ranks of the present attempt are, or until their end were, watched.
        unwatched: (rank or None, reason) of each process that trains unwatched.
        dropped: what was not recorded, by reason.
        faults: parts of the probe that switched themselves off, with how many processes.
        incidents: of this run, as in the JSON API, oldest first.
        incidents_left_out: older ones that are not listed.
        decisions: as in the JSON API.
        overhead: as in the JSON API.
        policy_hash: of the policy that the collector goes by; None when it has none, or does not say.
        policy_problems: why the newest text of the policy file is not in force.
        threats: what threatens the way back, in sentences.
        resume: what the ranks say of the checkpoint that they were told to go back to, as in the JSON API.
    """

    generations: int = 1
    attempts: int = 1
    world_size: int | None = None
    watched: int = 0
    unwatched: tuple[tuple[int | None, str], ...] = ()
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    incidents: tuple[dict[str, Any], ...] = ()
    incidents_left_out: int = 0
    decisions: tuple[dict[str, Any], ...] = ()
    overhead: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy_hash: str | None = None
    policy_problems: tuple[str, ...] = ()
    threats: tuple[str, ...] = ()
    resume: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether every rank is watched."""
        return self.world_size is not None and self.watched >= self.world_size

    def has_resumed(self, generation: int) -> bool | None:
        """Whether the ranks of that generation have opened their checkpoint; None when that is not known."""
        said = self.resume
        if said is None or said.get("generation") != generation:
            return None
        honoured = said.get("honoured")
        return honoured if isinstance(honoured, bool) else None


def parse(data: bytes) -> JobView | None:
    """Read a status document; None when it is not one."""
    try:
        document = json.loads(data)
        run = document["run"]
        # A collector of an earlier version says nothing of policies.
        policy = document.get("policy") or {}
        return JobView(
            generations=document["generation"] + 1,
            attempts=(document["attempt"] or 0) + 1,
            world_size=document["world_size"],
            watched=document["ranks_watched"],
            unwatched=tuple((one["rank"], str(one["reason"])) for one in document["unwatched"]),
            dropped=dict(document["dropped"]),
            faults=dict(document["faults"]),
            # A job of that name may have run before.
            incidents=tuple(incident for incident in document["incidents"] if incident["run"] == run),
            incidents_left_out=document["incidents_left_out"],
            decisions=tuple(document["decisions"]),
            overhead=dict(document["overhead"]),
            policy_hash=policy.get("hash"),
            policy_problems=tuple(map(str, policy.get("problems") or ())),
            threats=tuple(map(str, document.get("warnings") or ())),
            resume=_dict(document.get("resume")),
        )
    except (ValueError, KeyError, TypeError):
        return None


def _dict(value: Any) -> dict[str, Any] | None:
    return dict(value) if isinstance(value, dict) else None
