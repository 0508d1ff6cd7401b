"""A job's documents as a screen of text. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from gradwatch.cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

Document = dict[str, Any]

# What a column of a rank's row is drawn as, and how; the worst last.
_CELLS = {
    ".": (" ", ""),
    "x": ("x", "dim"),
    "c": ("-", "green"),
    "s": ("s", "yellow"),
    "b": ("#", "bold red"),
}
_WORSE = [*_CELLS]
_LEGEND = (
    "- clean   s skipped by the guard   # not finite   x ended   (a column: some steps, the newest last)"
)
# Beside the drawing: rank, node and magnitude.
_BESIDE = 40
# Above and below the ranks, without the incidents.
_AROUND = 10
_INCIDENTS = 3


def screen(job: Document, picture: Document, width: int, height: int) -> RenderableType:
    """A job as it is now.

    Args:
        job: its document.
        picture: its picture's document.
        width: of the screen, in characters.
        height: in lines.
    """
    incidents = _incidents(job)
    room = max(4, height - _AROUND - 2 * len(incidents))
    return Group(
        _head(job),
        *(Text(printable(f"! {warning}"), style="yellow") for warning in job["warnings"][-2:]),
        Text(),
        *incidents,
        Text(),
        _ranks(picture, max(20, width - _BESIDE), room),
        Text(_LEGEND, style="dim"),
    )


def _head(job: Document) -> Text:
    good = job["last_good_checkpoint"]
    ratio = job["overhead"]["ratio"]
    world = "?" if job["world_size"] is None else job["world_size"]
    facts = [
        job["status"] if job["halted"] is None else f"halted: {job['halted']}",
        f"step {_number(job['step'])}" + _behind(job),
        f"{job['ranks_watched']} of {world} ranks watched",
        f"generation {job['generation']}",
        "no good checkpoint" if good is None else f"good checkpoint at step {good['step']:,}",
        "" if ratio is None else f"overhead {ratio:.1%}",
    ]
    text = Text(job["job"], style="bold")
    return text.append("   " + "   ".join(fact for fact in facts if fact), style="not bold")


def _behind(job: Document) -> str:
    if job["step"] is None or job["slowest_step"] in {None, job["step"]}:
        return ""
    return f", slowest {job['slowest_step']:,}"


def _incidents(job: Document) -> list[Text]:
    known = job["incidents"]
    if not known:
        return [Text("no incident", style="green")]
    lines = []
    for one in known[: -_INCIDENTS - 1 : -1]:
        style = "dim" if one["status"] == "closed" else "bold red"
        head = Text(
            f"{one['id']}  {one['status']}  {one['cause'] or 'cause unknown'}, step {_number(one['step'])}  "
        )
        head.stylize(style)
        lines.append(
            head.append(printable(one["verdict"][0]) if one["verdict"] else "", style="not bold default")
        )
    older = len(known) - len(lines) + job["incidents_left_out"]
    if older > 0:
        lines.append(Text(f"and {older} older; gradwatch incidents --job {job['job']}", style="dim"))
    return lines


def _ranks(picture: Document, columns: int, room: int) -> RenderableType:
    rows = sorted(picture["ranks"], key=_urgency)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for head in ("rank", "node"):
        table.add_column(head, no_wrap=True)
    table.add_column("gradient", justify="right", no_wrap=True)
    table.add_column(_steps(picture), no_wrap=True)
    for row in rows[:room]:
        name = str(row["rank"]) if row["rank"] == row["last_rank"] else f"{row['rank']}-{row['last_rank']}"
        table.add_row(name, Text(row["node"]), _gradient(row), _drawn(row["states"], columns))
    if len(rows) > room:
        table.add_row(Text(f"and {len(rows) - room} more", style="dim"))
    return table


# The logarithm that stands for zero.
_ZERO = -300


def _gradient(row: Document) -> Text:
    """How large the newest gradient was."""
    if row["states"].rstrip(".x").endswith("b"):
        return Text("not finite", style="bold red")
    known = [one for one in row["magnitudes"] if one is not None]
    if not known:
        return Text("-")
    return Text("0" if known[-1] <= _ZERO else f"{10 ** known[-1]:.1e}")


def _steps(picture: Document) -> str:
    segments = picture["segments"]
    if not segments:
        return "no step yet"
    first, last = segments[0], segments[-1]
    return f"steps {first['first_step']:,} to {last['last_step']:,}"


def _urgency(row: Document) -> tuple[int, int, int]:
    """The bad ones first, those that were bad first before others; then as they are numbered."""
    bad_at = row["states"].find("b")
    return (0 if bad_at >= 0 else 1, bad_at, row["rank"])


def _drawn(states: str, columns: int) -> Text:
    """A row in so many characters: of several states in one, the worst."""
    text = Text()
    for letter in _fitted(states, columns):
        mark, style = _CELLS[letter]
        text.append(mark, style=style)
    return text


def _fitted(states: str, columns: int) -> Sequence[str]:
    if len(states) <= columns:
        return states
    edges = [place * len(states) // columns for place in range(columns + 1)]
    return [max(states[begin:end], key=_WORSE.index) for begin, end in pairwise(edges)]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
