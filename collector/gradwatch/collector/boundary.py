"""The parameters around the place where a backward pass went bad. Pure.

What is known of it: the bad gradients that the rank listed, with the place in which each arrived, and the
model's parameters in its own order, which rank 0 tells. A pass goes through a model backwards, more or less:
where the arrival is not known, the neighbours are those in the model's order, and it is said so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gradwatch.collector.schema import Document

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gradwatch.collector.model import Sighting

# Clean neighbours that are shown on each side.
_AROUND = 4
_SHOWN = 24


class BoundaryParameter(Document):
    """A parameter near the boundary."""

    name: str
    module: str
    module_class: str | None
    state: Literal["clean", "bad", "unknown"] = Field(
        description="Unknown: not listed as bad, where not all bad ones are listed."
    )
    value: str | None
    count: int | None
    numel: int | None
    backward_position: int | None
    first: bool = Field(description="Whether it is the one that the verdict names.")


class BoundaryDocument(Document):
    """Parameters in backward order, from clean to bad."""

    rank: int | None
    parameters: list[BoundaryParameter]
    clean_before: int | None = Field(description="Gradients that had arrived before the first bad one.")
    bad: int | None = Field(description="Parameters whose gradients were bad in that round.")
    total: int | None = Field(description="Parameters of the model.")
    missing: list[str] = Field(description="What is not known, in sentences.")


def boundary_of(
    first: Sighting | None, said: Iterable[Mapping[str, Any]], models: Iterable[Mapping[str, Any]]
) -> BoundaryDocument:
    """Around an incident's first bad gradient, from the log of events.

    Args:
        first: where the incident began; None when nobody is known to have been first.
        said: what its rank ever reported of non-finite gradients in that attempt.
        models: all that the attempt trains.
    """
    if first is None:
        return boundary(None, [], [])
    reports = list(said)
    roots = {one["root"] for one in reports}
    return boundary(
        first.rank,
        (one for one in reports if (one["round"], one["microbatch"]) == (first.round, first.microbatch)),
        (parameter for one in models if one["root"] in roots for parameter in one["parameters"]),
    )


def boundary(
    rank: int | None, nonfinite: Iterable[Mapping[str, Any]], parameters: Iterable[Mapping[str, Any]]
) -> BoundaryDocument:
    """Around an incident's first bad gradient.

    Args:
        rank: that was first; None when nobody was.
        nonfinite: what it reported of that round and micro-batch, as in the log of events.
        parameters: the model's, in its order; none when they were not told.
    """
    reports, known = list(nonfinite), list(parameters)
    if rank is None or not reports:
        why = (
            "No rank is known to have been first."
            if rank is None
            else "The rank reported no gradient of its own in that round."
        )
        return BoundaryDocument(
            rank=rank, parameters=[], clean_before=None, bad=None, total=len(known) or None, missing=[why]
        )
    bad = {gradient["parameter"]: gradient for report in reports for gradient in report["gradients"]}
    listed = sorted(bad.values(), key=_arrival)
    count = sum(report["gradients_total"] for report in reports)
    missing = []
    if count > len(bad):
        missing.append(
            f"{count - len(bad)} more bad gradients were counted and not listed: of each bucket 16 are."
        )
    first = listed[0]["parameter"] if listed else None
    position = listed[0]["backward_position"] if listed else None
    if position is None and listed:
        missing.append("In which order the gradients arrived is not known.")
    clean: list[BoundaryParameter] = []
    if known and first is not None:
        # As many as had arrived before it, at most.
        around = _AROUND if position is None else min(_AROUND, position)
        clean = _clean_before(known, bad, first, around, "unknown" if count > len(bad) else "clean")
        if clean:
            missing.append(
                "The neighbours before it are those in the order of the model, backwards; "
                "the order in which clean gradients arrive is not recorded."
            )
    elif not known:
        missing.append("The model's other parameters were not told.")
    return BoundaryDocument(
        rank=rank,
        parameters=[*clean, *(_bad(gradient, first) for gradient in listed[:_SHOWN])],
        clean_before=position,
        bad=count,
        total=len(known) or None,
        missing=missing,
    )


def _clean_before(
    known: list[Mapping[str, Any]],
    bad: Mapping[str, Any],
    first: str,
    around: int,
    state: Literal["clean", "unknown"],
) -> list[BoundaryParameter]:
    """Parameters that come after the first bad one in the model, and so likely before it in the pass."""
    names = [parameter["name"] for parameter in known]
    if first not in names:
        return []
    later = [parameter for parameter in known[names.index(first) + 1 :] if parameter["name"] not in bad]
    return [
        BoundaryParameter(
            name=parameter["name"],
            module=parameter["module"],
            module_class=parameter["module_class"],
            state=state,
            value=None,
            count=None,
            numel=None,
            backward_position=None,
            first=False,
        )
        for parameter in reversed(later[:around])
    ]


def _bad(gradient: Mapping[str, Any], first: str | None) -> BoundaryParameter:
    return BoundaryParameter(
        name=gradient["parameter"],
        module=gradient["module"],
        module_class=gradient["module_class"],
        state="bad",
        value=gradient["value"],
        count=gradient["count"],
        numel=gradient["numel"],
        backward_position=gradient["backward_position"],
        first=gradient["parameter"] == first,
    )


def _arrival(gradient: Mapping[str, Any]) -> tuple[bool, int]:
    position = gradient["backward_position"]
    return position is None, position or 0
