"""Who somebody is, and what that allows. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from fnmatch import fnmatchcase

ALL_JOBS = "*"
ME = "/api/v1/me"
METRICS = "/metrics"
_READING = frozenset({"GET", "HEAD"})


class Role(str, enum.Enum):
    """What somebody is there for."""

    AGENT = "agent"
    VIEWER = "viewer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Identity:
    """Somebody.

    Attributes:
        name: None for whoever shows the shared token, and for everybody where nothing is to be shown: they
            may report, read and order.
        role: what they are there for.
        jobs: patterns, as in a shell, of the jobs that they are bound to.
    """

    name: str | None
    role: Role
    jobs: tuple[str, ...] = (ALL_JOBS,)

    @property
    def has_all_jobs(self) -> bool:
        """Whether they are bound to no jobs in particular."""
        return ALL_JOBS in self.jobs

    def has_job(self, job: str) -> bool:
        """Whether a job is among theirs."""
        return any(fnmatchcase(job, pattern) for pattern in self.jobs)

    def __str__(self) -> str:
        return "the shared token" if self.name is None else f"identity {self.name!r}"


ANYBODY = Identity(None, Role.OPERATOR)


def why_no_reports(identity: Identity) -> str | None:
    """Why somebody may not report at all; None when they may."""
    if identity.name is None or identity.role is Role.AGENT:
        return None
    return f"{identity} has the role {identity.role.value}: only agents report, so give one's token instead"


def why_no_answer(identity: Identity, method: str, path: str) -> str | None:
    """Why somebody may not ask this over HTTP, whatever the job; None when they may."""
    if identity.name is None or path == ME:
        return None
    if identity.role is Role.AGENT:
        return f"{identity} has the role agent: agents report, and neither read nor order"
    if method not in _READING:
        if identity.role is Role.OPERATOR:
            return None
        return f"{identity} has the role {identity.role.value}: only operators order"
    if path == METRICS and not identity.has_all_jobs:
        return (
            f"{identity} is bound to {listed(identity)}, and metrics tell of all jobs: "
            'scrape as a viewer with jobs: ["*"]'
        )
    return None


def listed(identity: Identity) -> str:
    """The jobs that somebody is bound to, for a message."""
    return f"the jobs {', '.join(identity.jobs)}"
