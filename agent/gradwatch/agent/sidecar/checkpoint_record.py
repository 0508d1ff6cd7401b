"""From the result of a scan to its journal record. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints.result import Completeness, Section

if TYPE_CHECKING:
    from gradwatch.agent.checkpoints.place import Place
    from gradwatch.agent.checkpoints.result import Bad, ScanResult
    from gradwatch.agent.checkpoints.survey import Seen

# Names come from the checkpoint: whatever they are, a record stays small.
_TEXT = 300
_LISTED = 32
_COMPLETENESS = {
    Completeness.COMPLETE: "COMPLETENESS_COMPLETE",
    Completeness.IN_FLIGHT: "COMPLETENESS_IN_FLIGHT",
    Completeness.TORN: "COMPLETENESS_TORN",
}
_VALUE = {"nan": "NaN", "+inf": "+Inf", "-inf": "-Inf"}


def scanned(place: Place, seen: Seen, result: ScanResult) -> dict[str, Any]:
    """The `CheckpointScanned` message in its JSON mapping.

    Args:
        place: where it lies.
        seen: what was scanned, as it was before.
        result: of the scan.
    """
    buffers = [bad.name for bad in result.nonfinite if bad.section is Section.BUFFERS]
    steps = {(step.source.value, step.step): None for step in result.steps}
    message: dict[str, Any] = {
        "path": place.address(seen.path),
        "layout": result.layout or "",
        "reason": result.reason[:_TEXT],
        "bad_buffers": [name[:_TEXT] for name in buffers[:_LISTED]],
        "steps": [{"source": source, "step": step} for source, step in list(steps)[:_LISTED]],
        "modified_at": seen.modified_at,
        "error": _error(result)[:_TEXT],
        "found": _found(result)[:_TEXT],
        "nbytes": result.nbytes,
        "seconds": result.read_seconds,
    }
    if result.completeness is not None:
        message["completeness"] = _COMPLETENESS[result.completeness]
    if result.finite is not None:
        message["finite"] = result.finite
    return {key: _text(value) for key, value in message.items()}


def rewritten(place: Place, seen: Seen) -> dict[str, Any]:
    """The message about a checkpoint that was scanned, and is written again now."""
    return {
        "path": place.address(seen.path),
        "completeness": _COMPLETENESS[Completeness.IN_FLIGHT],
        "reason": "it is written again",
        "modified_at": seen.modified_at,
    }


def _error(result: ScanResult) -> str:
    if result.error is not None:
        return result.error
    judged = next((item for item in result.unreadable if item.judged), None)
    return "" if judged is None else f"{judged.file}: {judged.reason}"


def _found(result: ScanResult) -> str:
    """One bad tensor; of a buffer only if nothing else is bad."""
    bad = min(result.nonfinite, key=lambda one: one.section is Section.BUFFERS, default=None)
    return "" if bad is None else _words(bad)


def _words(bad: Bad) -> str:
    return f"{bad.name[: _TEXT // 2]} holds {bad.count} {_VALUE.get(bad.value, bad.value)}"


def _text(value: Any) -> Any:
    """Names in a checkpoint may hold what is no text; in a record that would cost the line."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return [_text(item) for item in value] if isinstance(value, list) else value
