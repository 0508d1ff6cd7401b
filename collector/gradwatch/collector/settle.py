"""Bring a job's incidents up to date with what has become known. Pure.

An attempt has at most one open incident. Evidence that lies apart from it waits in
`pending` until that incident is closed, so that what becomes an incident depends on
logical time, and not on who reported first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradwatch.collector import evidence as ev
from gradwatch.collector import incident as inc
from gradwatch.collector.attribution import attribute, is_waiting
from gradwatch.collector.draft import News, counted
from gradwatch.collector.model import CloseReason, Move, Status, UnknownReason, cause_label
from gradwatch.collector.roster import Roster, is_rolled_back
from gradwatch.collector.runs import is_over
from gradwatch.collector.words import STEPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.collector.draft import Draft
    from gradwatch.collector.model import (
        Attempt,
        AttemptId,
        Evidence,
        Incident,
        JobState,
        KnownModel,
        Replayed,
        Skips,
        Verdict,
    )

# Replays may arrive before what they are of: another rank's journal has them.
_REPLAYED = 16
# Steps of earlier incidents that a verdict names.
_BEFORE = STEPS + 1


def settle(draft: Draft, job_name: str) -> None:
    """Open, revise, confirm and close the job's incidents as far as is due."""
    for attempt_id in draft.jobs[job_name].attempts:
        news = draft.news.get(attempt_id)
        attempt = draft.attempts[attempt_id]
        if news is None and _open_incident(draft, attempt) is None:
            continue
        news = news or News()
        evidence = _place(draft, attempt_id, news)
        _revise(draft, attempt_id, evidence, news)
        _advance(draft, attempt_id)
        _compare(draft, attempt_id)


def following(attempt: Attempt, evidence: Evidence) -> int | None:
    """The round in which gradients that do not belong to the evidence were bad again, as far as known."""
    rounds = [part.first_round for part in attempt.pending]
    # Those that belong to it are in it by now.
    rounds += [run.first_round for run in attempt.skips if run.first_round > evidence.last_round]
    return min(rounds, default=None)


# ---------------------------------------------------------------- evidence


def _place(draft: Draft, attempt_id: AttemptId, news: News) -> dict[str, Evidence]:
    """Give the news to the incidents whose rounds they belong to, and keep the rest pending.

    Returns:
        By incident, its evidence.
    """
    attempt = draft.attempts[attempt_id]
    evidence = {id_: draft.incidents[id_].evidence for id_ in attempt.incidents}
    told = (news.sightings, news.stretches, news.skips, news.replayed, news.flown, news.rehearsed)
    if not any(told):
        return evidence
    skips = ev.with_skips(attempt.skips, news.skips)
    new_skips = [run for run in skips if run not in attempt.skips]
    if new_skips:
        evidence = {id_: ev.skipped(known, new_skips) for id_, known in evidence.items()}
    pending = ev.gather([*attempt.pending, *ev.clusters(news.sightings, skips)], skips)
    pending = _distribute(evidence, pending, skips)
    for stretch in news.stretches:
        evidence = {id_: ev.stretched(known, stretch) for id_, known in evidence.items()}
        pending = ev.gather((ev.stretched(part, stretch) for part in pending), skips)
    pending = _distribute(evidence, pending, skips)
    open_ = _open_incident(draft, attempt)
    if open_ is not None and open_.status is Status.SUSPECTED and pending:
        # Nobody has vouched for the rounds before it yet: the earliest comes first.
        earliest, *rest = ev.gather([evidence[open_.id], *pending], skips)
        evidence[open_.id] = earliest
        pending = tuple(rest)
    replayed = (*attempt.replayed, *news.replayed)
    evidence = {id_: _with_told(known, replayed, news) for id_, known in evidence.items()}
    pending = tuple(_with_told(part, replayed, news) for part in pending)
    replayed = replayed[-_REPLAYED:]
    if (pending, skips, replayed) != (attempt.pending, attempt.skips, attempt.replayed):
        draft.attempts[attempt_id] = replace(attempt, pending=pending, skips=skips, replayed=replayed)
    return evidence


def _with_told(evidence: Evidence, replayed: Sequence[Replayed], news: News) -> Evidence:
    known = ev.with_rehearsed(ev.with_replayed(evidence, replayed), news.rehearsed)
    return ev.with_flown(known, news.flown)


def _distribute(
    evidence: dict[str, Evidence], pending: tuple[Evidence, ...], skips: tuple[Skips, ...]
) -> tuple[Evidence, ...]:
    """Merge what is pending into the incidents it belongs to; what belongs to none is left."""
    left = list(pending)
    if not left:
        return ()
    for id_, known in evidence.items():
        grown = known
        # What it takes in may bring it near to more.
        while (part := next((part for part in left if ev.near(grown, part)), None)) is not None:
            left.remove(part)
            grown = ev.skipped(ev.merge(grown, part), skips)
        evidence[id_] = grown
    return tuple(left)


# ---------------------------------------------------------------- verdicts


def _revise(draft: Draft, attempt_id: AttemptId, evidence: dict[str, Evidence], news: News) -> None:
    """Attribute again where something changed that a verdict rests on."""
    attempt, heard = draft.attempts[attempt_id], news.ranks
    roster = Roster(draft, draft.jobs[attempt_id.job], attempt)
    for id_, now_known in evidence.items():
        incident = draft.incidents[id_]
        same = now_known == incident.evidence and not news.models
        if same and not _matters(roster, incident, heard):
            continue
        verdict = _verdict(roster, now_known, incident, heard, attempt.models)
        verdict = replace(verdict, before=incident.verdict.before)
        if now_known != incident.evidence or verdict != incident.verdict:
            draft.incidents[id_] = inc.revise(incident, now_known, verdict)


def _compare(draft: Draft, attempt_id: AttemptId) -> None:
    """Tell each incident at which steps its first rank had been first before, in the attempt."""
    steps: dict[int, list[int]] = {}
    for id_ in draft.attempts[attempt_id].incidents:
        incident = draft.incidents[id_]
        first = incident.verdict.first
        before = () if first is None or incident.verdict.tie else tuple(steps.get(first.rank, ())[:_BEFORE])
        if before != incident.verdict.before:
            verdict = replace(incident.verdict, before=before)
            draft.incidents[id_] = inc.revise(incident, incident.evidence, verdict)
        if first is not None and not incident.verdict.tie:
            steps.setdefault(first.rank, []).append(ev.first_step(incident.evidence))


def _matters(roster: Roster, incident: Incident, heard: set[int]) -> bool:
    """Whether who is clean and who is unknown may be different, though the evidence is the same."""
    unknown = incident.verdict.unknown_ranks
    if incident.status is not Status.SUSPECTED:
        return not heard.isdisjoint(unknown)
    # Of thousands of ranks each says in its turn that it has passed. It is enough to look again
    # when the last has, and with every tick. Sidecars tend to report in the order of the ranks,
    # and so the last ones are the ones to ask.
    return not (
        heard
        and roster.is_waited_for(reversed([*unknown]), incident.evidence.first_round, incident.opened_at)
    )


def _verdict(
    roster: Roster,
    evidence: Evidence,
    incident: Incident,
    heard: set[int],
    models: tuple[KnownModel, ...],
) -> Verdict:
    verdict = incident.verdict
    if incident.status is Status.SUSPECTED:
        return attribute(evidence, *roster.sorted_out(evidence, incident.opened_at), models)
    if _same_question(evidence, incident.evidence) and heard.isdisjoint(verdict.unknown_ranks):
        return attribute(evidence, verdict.clean_ranks, verdict.unknown_ranks, models)
    clean, unknown = roster.sorted_out(evidence, incident.opened_at)
    # Once it is confirmed nothing is waited for any more.
    for rank, reason in unknown.items():
        if reason is UnknownReason.WAITING:
            unknown[rank] = verdict.unknown_ranks.get(rank, UnknownReason.SILENT)
    return attribute(evidence, clean, unknown, models)


def _same_question(one: Evidence, other: Evidence) -> bool:
    """Whether the same ranks are to be sorted out, as seen from the same round."""
    return (
        one.first_round == other.first_round
        and ev.suspects(one).keys() == ev.suspects(other).keys()
        and ev.is_local(one) == ev.is_local(other)
    )


# ---------------------------------------------------------------- transitions


def _advance(draft: Draft, attempt_id: AttemptId) -> None:
    """Take every step that is due."""
    while True:
        attempt = draft.attempts[attempt_id]
        job = draft.jobs[attempt_id.job]
        incident = _open_incident(draft, attempt)
        if incident is None:
            if not attempt.pending:
                return
            _open(draft, job, attempt)
        elif incident.status is Status.SUSPECTED:
            if is_waiting(incident.verdict) or _may_say_more(draft, job, attempt, incident):
                return
            _confirm(draft, job, incident)
        else:
            reason = _close_reason(draft, job, attempt, incident)
            if reason is None:
                return
            _put(draft, inc.close(incident, reason, draft.now), reason.value)


def _may_say_more(draft: Draft, job: JobState, attempt: Attempt, incident: Incident) -> bool:
    """Whether a rank that was bad has not passed the round: it may be replaying its micro-batch."""
    evidence = incident.evidence
    bad = [rank for rank, seen in ev.suspects(evidence).items() if seen.round == evidence.first_round]
    return Roster(draft, job, attempt).is_waited_for(bad, evidence.first_round, incident.opened_at)


def _open(draft: Draft, job: JobState, attempt: Attempt) -> None:
    evidence, *rest = attempt.pending
    sorted_out = Roster(draft, job, attempt).sorted_out(evidence, draft.now)
    verdict = attribute(evidence, *sorted_out, attempt.models)
    incident = inc.open_incident(attempt, evidence, verdict, draft.now)
    draft.attempts[attempt.id] = replace(
        attempt, pending=tuple(rest), incidents=(*attempt.incidents, incident.id)
    )
    _put(draft, incident, verdict.sentences[0])


def _confirm(draft: Draft, job: JobState, incident: Incident) -> None:
    confirmed = counted(job.incidents_confirmed, cause_label(incident.verdict.cause))
    draft.jobs[job.name] = replace(job, incidents_confirmed=confirmed)
    _put(draft, inc.confirm(incident, draft.now), incident.verdict.sentences[0])


def _close_reason(draft: Draft, job: JobState, attempt: Attempt, incident: Incident) -> CloseReason | None:
    """Why the incident is over; None while it is not."""
    next_generation = attempt.id.generation + 1
    unasked = any(launch.by_itself == next_generation for launch in job.launches.values())
    if is_rolled_back(job, attempt) and not unasked:
        return CloseReason.ROLLBACK
    if attempt.id != job.current or unasked:
        return CloseReason.ATTEMPT_OVER
    if is_over(job, attempt, draft.journals):
        return CloseReason.JOB_ENDED
    evidence = incident.evidence
    beyond = following(attempt, evidence)
    if beyond is not None:
        # It is far enough away, unless somebody may yet fill the space between.
        space = min(evidence.last_round + ev.CLEAN_ROUNDS, beyond - 1)
        waiting = Roster(draft, job, attempt).is_waited_for(
            range(attempt.world_size), space, incident.opened_at
        )
        return None if waiting else CloseReason.CLEAN_ROUNDS
    last_round = max(evidence.last_round, attempt.last_bad_round or 0)
    if attempt.reduced_round > last_round + ev.CLEAN_ROUNDS:
        # Of weights that are bad again no reduced gradient tells: all ranks are heard.
        waiting = bool(evidence.weights) and Roster(draft, job, attempt).is_waited_for(
            range(attempt.world_size), last_round + ev.CLEAN_ROUNDS, incident.opened_at
        )
        return None if waiting else CloseReason.CLEAN_ROUNDS
    # After skipped updates one clean update attempt is enough, once it is over.
    clean = last_round == evidence.last_round and attempt.reduced_round > last_round + 1
    skipped = ev.is_over_before(evidence, attempt.reduced_round, attempt.step)
    return CloseReason.CLEAN_ROUNDS if clean and skipped else None


def _open_incident(draft: Draft, attempt: Attempt) -> Incident | None:
    if not attempt.incidents:
        return None
    newest = draft.incidents[attempt.incidents[-1]]
    return None if newest.status is Status.CLOSED else newest


def _put(draft: Draft, incident: Incident, because: str) -> None:
    draft.incidents[incident.id] = incident
    draft.moves.append(Move(incident.id, incident.attempt.job, incident.status, because))
