"""What the launcher says, and when. Pure: a view of the job goes in, lines come out."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradwatch.cli.launcher.job_view import JobView

_LISTED = 8
# What is not said any more is in the report, and `gradwatch incidents` lists it.
MAX_INCIDENTS_SAID = 100
# Decisions to do nothing are in the report.
_TOLD = frozenset({"warn", "rollback", "halt"})
_MORE = (
    f"more than {MAX_INCIDENTS_SAID} incidents: no more of them are told here, nor warnings about them; "
    "`gradwatch incidents` lists them all"
)
# As the collector counts it.
_DUPLICATE = "duplicate_rank"


class Weight(enum.Enum):
    """How much a line matters; `--quiet` leaves out the notes."""

    NOTE = "note"
    VERDICT = "verdict"
    WARNING = "warning"


@dataclasses.dataclass(frozen=True)
class Line:
    """One line on stderr."""

    weight: Weight
    text: str


@dataclasses.dataclass(frozen=True)
class Said:
    """What has been said, so that nothing is said twice."""

    watching: bool = False
    incidents: frozenset[str] = frozenset()
    decisions: frozenset[str] = frozenset()
    warnings: frozenset[str] = frozenset()


def news(said: Said, view: JobView, policy_hash: str | None = None) -> tuple[Said, list[Line]]:
    """What is new while the command runs.

    Args:
        said: from the last call.
        view: the job now.
        policy_hash: of the policy that the launcher was given; None for none.
    """
    lines: list[Line] = []
    watching, warnings = said.watching, said.warnings
    if not watching and view.complete:
        watching = True
        lines.append(Line(Weight.NOTE, f"watching {view.watched} of {view.world_size} ranks"))
    for text in [*unwatched_lines(view), *trouble_lines(view), *policy_lines(view, policy_hash)]:
        if text not in warnings:
            warnings |= {text}
            lines.append(Line(Weight.WARNING, text))
    told = _of_incidents(said.incidents, view, lines)
    decided = _of_decisions(said.decisions, view, lines, in_full=len(told) <= MAX_INCIDENTS_SAID)
    return Said(watching, told, decided, warnings), lines


def _of_incidents(told: frozenset[str], view: JobView, lines: list[Line]) -> frozenset[str]:
    for incident in view.incidents:
        if incident["id"] not in told and incident["status"] != "suspected":
            told |= {incident["id"]}
            if len(told) <= MAX_INCIDENTS_SAID:
                lines.append(Line(Weight.VERDICT, verdict_line(incident)))
            elif len(told) == MAX_INCIDENTS_SAID + 1:
                lines.append(Line(Weight.VERDICT, _MORE))
    return told


def _of_decisions(told: frozenset[str], view: JobView, lines: list[Line], *, in_full: bool) -> frozenset[str]:
    for decision in view.decisions:
        # What is performed here, or fails, the performer tells itself.
        is_news = decision["outcome"] not in {"pending", "performed", "failed"}
        if is_news and decision["id"] not in told and decision["action"] in _TOLD:
            told |= {decision["id"]}
            if in_full or decision["action"] != "warn":
                lines.append(Line(Weight.VERDICT, decision_line(decision)))
    return told


def verdict_line(incident: dict[str, object]) -> str:
    """An incident's verdict in one line, what happened first."""
    sentences = incident.get("verdict")
    story = " ".join(map(str, sentences)) if isinstance(sentences, (list, tuple)) else str(sentences)
    # A collector of an earlier version gives no title.
    title = f"{incident['title']}. " if incident.get("title") else ""
    return f"incident {incident['id']}: {title}{story}"


def decision_line(decision: dict[str, object]) -> str:
    """A decision in one line: its reason, and what is done."""
    effect = decision.get("concluded") or decision.get("effect")
    what = f"decision {decision['id']}: {decision['action']} ({decision['outcome']}): {decision['reason']}"
    return f"{what}; {effect}" if effect else what


def policy_lines(view: JobView, policy_hash: str | None) -> list[str]:
    """What is wrong with the policy in force, and what threatens the way back."""
    lines = [
        f"the policy file has changed and is not in force: {problem}" for problem in view.policy_problems
    ]
    if None not in {policy_hash, view.policy_hash} and policy_hash != view.policy_hash:
        lines.append(
            f"the collector goes by another policy (hash {view.policy_hash}) than this run was given "
            f"({policy_hash})"
        )
    return [*lines, *view.threats]


def unwatched_lines(view: JobView) -> list[str]:
    """Processes that said they train unwatched, by reason."""
    by_reason: dict[str, list[int | None]] = {}
    for rank, reason in view.unwatched:
        by_reason.setdefault(reason, []).append(rank)
    return [f"NOT WATCHED: {_who(ranks)}: {reason}" for reason, ranks in by_reason.items()]


def trouble_lines(view: JobView) -> list[str]:
    """What else keeps the watch from being whole."""
    lines = [
        f"a part of the probe failed and switched itself off: {part}; the training goes on without it"
        for part in view.faults
    ]
    if view.dropped.get(_DUPLICATE):
        lines.append(
            "two live processes claim the same rank: the first stays watched, the other is only counted"
        )
    return lines


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What is known besides the collector's view once the command has ended.

    Attributes:
        view: None when no status ever arrived.
        autoloaded: some process imported torch with the probe in it.
        autoload_off: TORCH_DEVICE_BACKEND_AUTOLOAD=0 is in the launcher's environment.
        local_ranks: ranks that began a journal on this node: rank -> world size.
        own_collector: no --collector was given.
        spool_error: why there is no spool; None when there is one.
    """

    view: JobView | None
    autoloaded: bool
    autoload_off: bool
    local_ranks: dict[int, int]
    own_collector: bool
    spool_error: str | None = None


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of the job was watched."""

    watched: int
    world_size: int | None
    warnings: list[str]

    @property
    def complete(self) -> bool:
        """Whether all of it was."""
        return self.world_size is not None and self.watched >= self.world_size and not self.warnings


def coverage(now: Circumstances) -> Coverage:
    """Judge at the end how much was watched, with the cause of every gap."""
    if now.spool_error is not None:
        return Coverage(0, None, [f"NOT WATCHED: {now.spool_error}"])
    if now.view is None or (not now.view.watched and now.local_ranks):
        return _local_coverage(now)
    view = now.view
    reasons = unwatched_lines(view)
    watched = view.watched
    if not watched:
        return Coverage(0, view.world_size, reasons or [_why_nothing(now)])
    if not view.complete:
        reasons = [_why_missing(view, now), *reasons]
    return Coverage(watched, view.world_size, reasons)


def _local_coverage(now: Circumstances) -> Coverage:
    world_size = max(now.local_ranks.values(), default=None)
    watched = len(now.local_ranks)
    if not watched:
        return Coverage(0, None, [_why_nothing(now)])
    return Coverage(watched, world_size, ["the collector never answered, so nothing is known of incidents"])


def _why_nothing(now: Circumstances) -> str:
    if now.autoloaded:
        return (
            "NOT WATCHED: no rank was watched: torch was imported with gradwatch in it, "
            "but no process wrapped a model in DistributedDataParallel or fully_shard, "
            "or gave parameters to an optimizer of torch's"
        )
    if now.autoload_off:
        return (
            "NOT WATCHED: no rank was watched: TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from "
            "loading gradwatch; unset it"
        )
    return (
        "NOT WATCHED: no rank was watched: no process loaded gradwatch with torch. Either the command "
        "does not use torch, or gradwatch is not installed in the Python that runs it "
        "(pip install --no-deps gradwatch there), or the script sets TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    )


def _why_missing(view: JobView, now: Circumstances) -> str:
    text = (
        f"NOT WATCHED: {(view.world_size or 0) - view.watched} of {view.world_size} ranks; "
        f"{view.watched} were watched"
    )
    if now.own_collector and not view.unwatched:
        text += ". If they run on other nodes, give every launcher the same --collector HOST:PORT and --job"
    return text


def last_line(job: str, covered: Coverage, view: JobView | None) -> str:
    """The line a run ends with: ranks, incidents, overhead."""
    of = "?" if covered.world_size is None else covered.world_size
    ranks = f"{covered.watched} of {of} ranks watched"
    if view is None:
        return f"job {job} ended: {ranks}, incidents unknown, overhead unknown"
    count = len(view.incidents)
    incidents = {0: "no incident", 1: "1 incident"}.get(count, f"{count} incidents")
    if view.incidents_left_out:
        incidents += f" and {view.incidents_left_out} older ones"
    ratio = view.overhead.get("ratio")
    overhead = (
        f"overhead {ratio:.2%} of the step time" if isinstance(ratio, (int, float)) else "overhead unknown"
    )
    return f"job {job} ended: {ranks}, {incidents}, {overhead}"


def _who(ranks: Sequence[int | None]) -> str:
    known = sorted({rank for rank in ranks if rank is not None})
    if not known:
        return "a process" if len(ranks) == 1 else f"{len(ranks)} processes"
    return ("rank " if len(known) == 1 else "ranks ") + _numbers(known)


def _numbers(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:_LISTED]))
    return listed if len(ranks) <= _LISTED else f"{listed} and {len(ranks) - _LISTED} more"
