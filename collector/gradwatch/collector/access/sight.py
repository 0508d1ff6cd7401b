"""What of the collector's state somebody sees. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradwatch.collector.access.identity import Identity
    from gradwatch.collector.model import State


def seen_by(identity: Identity, state: State) -> State:
    """The state with the jobs and incidents that are theirs: the others are as if they had never been."""
    if identity.has_all_jobs:
        return state
    jobs = {name: job for name, job in state.jobs.items() if identity.has_job(name)}
    incidents = {id_: one for id_, one in state.incidents.items() if one.attempt.job in jobs}
    return replace(state, jobs=jobs, incidents=incidents)
