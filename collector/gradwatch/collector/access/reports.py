"""Whether a report is somebody's to make. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.access.identity import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gradwatch.collector.access.identity import Identity
    from gradwatch.collector.model import Journal
    from gradwatch.collector.observations import Report


def why_not_taken(identity: Identity, report: Report, journals: Mapping[str, Journal]) -> str | None:
    """Why a report is not taken from somebody; None when it is.

    Of every journal in it, the job must be theirs: the one that the journal belongs to since its first
    line, and any that a record in it names now. A journal that is not known and names no job counts
    nowhere, so it is nobody's business.

    Args:
        identity: whoever reports.
        report: all of it is taken, or nothing.
        journals: those that are known, by incarnation.
    """
    if identity.has_all_jobs:
        return None
    return why_not_theirs(identity, jobs_of(report, journals))


def why_not_theirs(identity: Identity, jobs: Iterable[str]) -> str | None:
    """Why somebody may not report for these jobs, or ask how they are; None when they may."""
    foreign = next((job for job in jobs if not identity.has_job(job)), None)
    if foreign is None:
        return None
    return f"{identity} may not report for job {foreign[:200]!r}: it is bound to {listed(identity)}"


def jobs_of(report: Report, journals: Mapping[str, Journal]) -> Iterable[str]:
    """The jobs that a report is about, in its order."""
    batches = (batch.incarnation for batch in report.batches)
    for incarnation in (*batches, *(progress.incarnation for progress in report.progress)):
        known = journals.get(incarnation)
        if known is not None and known.job is not None:
            yield known.job
    for batch in report.batches:
        for record in batch.records:
            job = getattr(record.body, "job", None)
            if job is not None:
                yield job
