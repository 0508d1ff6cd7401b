"""A whole look at one checkpoint: is it all there, is it finite, which step is it."""

from __future__ import annotations

import contextlib
import re
import time
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints import complete, find, finite, listing
from gradwatch.agent.checkpoints.finite import Found, Looker, Run
from gradwatch.agent.checkpoints.opened import Opened, open_checkpoint
from gradwatch.agent.checkpoints.result import (
    Bad,
    Completeness,
    Layout,
    ScanResult,
    Section,
    SectionCount,
    Step,
    StepSource,
    Unreadable,
)
from gradwatch.agent.checkpoints.sections import MAX_STEP
from gradwatch.agent.checkpoints.values import Inline, TornError, UnreadableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from gradwatch.agent.checkpoints.listing import File
    from gradwatch.agent.checkpoints.sections import Named

# Named in the result, for each section; all are counted.
MAX_NAMED = 20
# Honest checkpoints share storages between tensors; hostile ones name the same bytes a million times.
_MAX_READS = 8
# Names that are a parameter's, whatever its values look like.
_SURELY_PARAMETERS = ("weight", "bias")


def look(path: Path) -> ScanResult:
    """Look at the checkpoint at `path`. Never raises for what is in it.

    Raises:
        OSError: the path cannot be read.
    """
    name = path.name
    before = listing.take(path.parent, at=name)
    if name in before.symlinks:
        return ScanResult(str(path), error="it is a symbolic link, which is not followed")
    candidate = find.at(before, name)
    if candidate is None:
        return ScanResult(str(path), error="nothing in it looks like a checkpoint")
    files = _files(before, candidate)
    opened = open_checkpoint(path, candidate, files, _siblings(path, candidate))
    values = _Values(opened)
    values.look(sum(file.size for file in files.values()))
    try:
        after = _files(listing.take(path.parent, at=name), candidate)
    except OSError:
        after = {}
    completeness, reason = complete.verdict(opened.problems, files, after, time.time())
    unknown = bool(opened.problems or any(item.judged for item in opened.unreadable))
    found_any = any(count.tensors for count in values.sections.values())
    bad = any(values.sections[part].nonfinite_tensors for part in (Section.PARAMETERS, Section.OPTIMIZER))
    nothing = completeness is Completeness.COMPLETE and not found_any and not unknown
    return ScanResult(
        path=str(path),
        layout=opened.layout.value,
        completeness=completeness,
        reason=reason,
        finite=_finite(completeness, bad=bad, unknown=unknown or not found_any),
        sections=values.sections,
        nonfinite=tuple(values.bad),
        steps=tuple(opened.steps),
        unreadable=tuple(opened.unreadable),
        nbytes=sum(file.size for file in files.values()),
        read_bytes=values.read_bytes,
        read_seconds=values.read_seconds,
        error="it holds neither parameters nor optimizer state" if nothing else None,
    )


def _finite(completeness: Completeness, *, bad: bool, unknown: bool) -> bool | None:
    if completeness is Completeness.IN_FLIGHT:
        return None
    if bad:
        return False
    return None if unknown else True


def _files(seen: listing.Listing, candidate: find.Candidate) -> dict[str, File]:
    if not candidate.is_folder:
        return {".": seen.files[candidate.path]} if candidate.path in seen.files else {}
    below = seen.below(candidate.path)
    return {path: file for path, file in below.items() if path in candidate.files}


def _siblings(path: Path, candidate: find.Candidate) -> list[list[str]]:
    """The files directly in the other Hugging Face checkpoints beside one, of the same series."""
    if candidate.layout is not Layout.HF:
        return []
    siblings = []
    try:
        for other in sorted(path.parent.iterdir()):
            alike = other.name != path.name and _kind(other.name) == _kind(path.name)
            if alike and other.is_dir() and not other.is_symlink():
                names = [entry.name for entry in other.iterdir()]
                if find.folder_layout(names, other.name) is Layout.HF:
                    siblings.append(names)
    except OSError:
        return []
    return siblings


def _kind(name: str) -> str:
    """A folder's name but for its numbers: a final model is no sibling of checkpoint-500."""
    return re.sub(r"\d+", "0", name)


class _Values:
    """The look at the values of an opened checkpoint."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.sections = dict.fromkeys(Section, SectionCount())
        self.bad: list[Bad] = []
        self.read_bytes = 0
        self.read_seconds = 0.0

    def look(self, size: int) -> None:
        began = time.perf_counter()
        places = self._places()
        distinct: dict[tuple[object, ...], Run] = {
            _identity(run): run for runs in places.values() for run in runs
        }
        if sum(run.extent.nbytes for run in distinct.values()) > _MAX_READS * size:
            self._unreadable(".", "its tensors overlap more than those of an honest checkpoint do")
            return
        looker = Looker()
        found: dict[tuple[object, ...], Found] = {}
        try:
            order = sorted(distinct.items(), key=lambda item: (item[1].extent.file, item[1].extent.offset))
            for identity, run in order:
                with self._reported(run.extent.file.name):
                    found[identity] = looker.look(run)
            self._tell_steps(looker, places)
            for index, (file, named) in enumerate(self._opened.tensors):
                runs = places.get(index, [])
                whole = finite.merge(found[_identity(run)] for run in runs if _identity(run) in found)
                if isinstance(named.leaf, Inline):
                    whole = finite.look_inline(named.leaf)
                self._count(looker, file, named, runs, whole)
        finally:
            looker.close()
            self.read_bytes = looker.read_bytes
            self.read_seconds = time.perf_counter() - began

    def _places(self) -> dict[int, list[Run]]:
        places = {}
        for index, (file, named) in enumerate(self._opened.tensors):
            with self._reported(file, f"{named.name}: "):
                places[index] = list(finite.runs(named.leaf))
        return places

    @contextlib.contextmanager
    def _reported(self, file: str, what: str = "") -> Iterator[None]:
        try:
            yield
        except TornError as error:
            self._opened.problems.append(f"{file}: {what}{error}")
        except (UnreadableError, OSError) as error:
            self._unreadable(file, f"{what}{error}")

    def _count(self, looker: Looker, file: str, named: Named, runs: list[Run], found: Found) -> None:
        section = named.section
        if found.count and self._is_mask(looker, named, runs, found):
            section = Section.BUFFERS
        count = self.sections[section]
        self.sections[section] = SectionCount(
            tensors=count.tensors + 1,
            nbytes=count.nbytes + sum(run.extent.nbytes for run in runs),
            nonfinite_tensors=count.nonfinite_tensors + bool(found.count),
            nonfinite_values=count.nonfinite_values + found.count,
        )
        if found.count and count.nonfinite_tensors < MAX_NAMED:
            self.bad.append(Bad(section, named.name, found.value, found.count, file))

    def _is_mask(self, looker: Looker, named: Named, runs: list[Run], found: Found) -> bool:
        """Whether what a state dict cannot tell from a parameter is a constant that holds infinities."""
        if named.section is not Section.PARAMETERS or found.nan or (found.positive and found.negative):
            return False
        if named.name.rpartition(".")[2] in _SURELY_PARAMETERS:
            return False
        try:
            return looker.constant_but_infinite(runs)
        except (UnreadableError, OSError):
            return False

    def _tell_steps(self, looker: Looker, places: Mapping[int, list[Run]]) -> None:
        """The optimizer's count of updates, where it keeps that in tensors."""
        told: Iterable[tuple[str, Run]] = (
            (named.name, places[index][0])
            for index, (_, named) in enumerate(self._opened.tensors)
            if named.is_step and places.get(index)
        )
        best: tuple[float, str] | None = None
        with contextlib.suppress(UnreadableError, OSError):
            for name, run in sorted(told, key=lambda item: (item[1].extent.file, item[1].extent.offset)):
                value = looker.first(run)
                if 0 <= value < MAX_STEP and (best is None or value > best[0]):
                    best = (value, name)
        if best is not None:
            self._opened.steps.append(Step(StepSource.OPTIMIZER, best[1], int(best[0])))

    def _unreadable(self, file: str, reason: str) -> None:
        if not any(item.judged and item.file == file for item in self._opened.unreadable):
            self._opened.unreadable.append(Unreadable(file, reason, judged=True))


def _identity(run: Run) -> tuple[object, ...]:
    view = None if run.view is None else (run.view.offset, run.view.size, run.view.stride)
    return (str(run.extent.file), run.extent.offset, run.extent.nbytes, run.dtype, view)
