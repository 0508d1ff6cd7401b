"""A checkpoint opened: what it lacks, what in it is judged, which steps it tells. Values stay on disk."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints import complete, dcp, find, safetensors_file, sections, torch_file
from gradwatch.agent.checkpoints.result import Layout, Section, Step, StepSource, Unreadable
from gradwatch.agent.checkpoints.values import Extent, TornError, UnreadableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from gradwatch.agent.checkpoints.find import Candidate
    from gradwatch.agent.checkpoints.listing import File

_MAX_JSON = 64 << 20
_NUMBERED = re.compile(r"(?:step|steps|iter|iteration|checkpoint|ckpt)[-_=]?(\d{1,18})(?!\d)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<!\d)\d{1,18}(?!\d)")
_INDEX = ".index.json"


@dataclass
class Opened:
    """A checkpoint whose pickles and headers have been read.

    Attributes:
        layout: what it turned out to be.
        tensors: those that are judged, with the file that names each.
        steps: found so far; those that the optimizer keeps in tensors are not read yet.
        problems: what is missing or damaged, in words.
        unreadable: files that are whole and cannot be read.
    """

    layout: Layout
    tensors: list[tuple[str, sections.Named]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)


def open_checkpoint(
    folder: Path, candidate: Candidate, files: Mapping[str, File], siblings: Collection[Collection[str]]
) -> Opened:
    """Read all of a checkpoint but its values.

    Args:
        folder: the checkpoint, or the file that it is.
        candidate: what it is by its names.
        files: its files, by path relative to `folder`; "." for itself.
        siblings: the names in other checkpoints beside it.
    """
    opened = _Opening(folder, candidate, files)
    opened.steps_of_name()
    if not candidate.is_folder:
        opened.file(".", None)
    elif candidate.layout is Layout.DCP:
        opened.dcp("")
    else:
        opened.folder(siblings)
    return opened.result


class _Opening:
    def __init__(self, folder: Path, candidate: Candidate, files: Mapping[str, File]) -> None:
        self._folder = folder
        self._candidate = candidate
        self._files = files
        self.result = Opened(candidate.layout)

    def steps_of_name(self) -> None:
        name = self._folder.name
        told = _NUMBERED.findall(name) or _NUMBER.findall(name)
        if told:
            self.result.steps.append(Step(StepSource.NAME, name, int(told[-1])))

    def folder(self, siblings: Collection[Collection[str]]) -> None:
        """Several files, of which those that hold no parameters and no optimizer state are only checked."""
        direct = {path for path in self._candidate.files if "/" not in path}
        shards = [shard for path in sorted(direct) if path.endswith(_INDEX) for shard in self._shards(path)]
        if self._candidate.layout is Layout.HF:
            self.result.problems += complete.hf_problems(direct, shards, siblings)
        folders = {
            path.rpartition("/")[0] for path in self._candidate.files if path.endswith(find.SHARD_SUFFIX)
        }
        for inner in sorted(folders):
            self.dcp(inner + "/")
        for path in sorted(self._candidate.files):
            name = path.rpartition("/")[2]
            if name == find.TRAINER_STATE:
                self._trainer_state(path)
            elif find.is_side_file(name):
                self._side(path)
            elif find.is_optimizer_file(name):
                self.file(path, Section.OPTIMIZER)
            elif find.file_layout(name) is not None:
                self.file(path, Section.PARAMETERS if find.is_model_file(name) else None)

    def file(self, path: str, section: Section | None) -> None:
        """One file that is judged."""
        whole = self._folder if path == "." else self._folder / path
        try:
            extent = Extent(whole, 0, self._files[path].size)
            if whole.name.endswith(".safetensors"):
                value: Any = safetensors_file.read(extent)
                section = section or Section.PARAMETERS
            else:
                value = torch_file.read(extent)
            self._judge(value, path, section)
        except TornError as error:
            self.result.problems.append(str(error) if path == "." else f"{path}: {error}")
        except (UnreadableError, OSError) as error:
            self.result.unreadable.append(Unreadable(path, _words(error), judged=True))

    def dcp(self, prefix: str) -> None:
        """A folder of shards: all of the checkpoint if the prefix is empty."""
        files = {path[len(prefix) :]: file for path, file in self._files.items() if path.startswith(prefix)}
        marker = f"{prefix}{find.METADATA}"
        if find.METADATA not in files:
            self.result.problems.append(f"{marker}, which is written last, is missing")
            return
        folder = self._folder / prefix
        try:
            metadata = dcp.read_metadata((folder / find.METADATA).read_bytes())
            self.result.problems += complete.dcp_problems(metadata, files)
            self.result.problems += [f"no shard has {key}" for key in dcp.missing(metadata)[:1]]
            self._judge(dcp.tree(folder, metadata), marker, None)
        except (UnreadableError, OSError) as error:
            self.result.problems.append(f"{marker}: {_words(error)}")
            return
        for path in sorted(files):
            # Lightning leaves what is not sharded beside the shards.
            if find.file_layout(path) is not None:
                self.file(prefix + path, None)

    def _judge(self, value: Any, path: str, section: Section | None) -> None:
        judged = sections.judge(value, as_section=section)
        self.result.tensors += [(path, named) for named in judged.tensors]
        self.result.steps += judged.steps
        if not self._candidate.is_folder and path == ".":
            if judged.lightning:
                self.result.layout = Layout.LIGHTNING
            elif self._candidate.layout is Layout.LIGHTNING:
                self.result.layout = Layout.TORCH
        elif judged.lightning and self._candidate.layout is Layout.DCP:
            self.result.layout = Layout.LIGHTNING

    def _side(self, path: str) -> None:
        try:
            torch_file.check(Extent(self._folder / path, 0, self._files[path].size))
        except TornError as error:
            self.result.problems.append(f"{path}: {error}")
        except (UnreadableError, OSError) as error:
            self.result.unreadable.append(Unreadable(path, _words(error), judged=False))

    def _trainer_state(self, path: str) -> None:
        document = self._json(path)
        if document is None:
            return
        step = document.get("global_step")
        if type(step) is int and step >= 0:
            self.result.steps.append(Step(StepSource.TRAINER_STATE, "global_step", step))

    def _shards(self, path: str) -> list[str]:
        document = self._json(path)
        weights = None if document is None else document.get("weight_map")
        if document is not None and not isinstance(weights, dict):
            self.result.problems.append(f"{path}: it names no shards")
        return sorted({str(shard) for shard in weights.values()}) if isinstance(weights, dict) else []

    def _json(self, path: str) -> dict[str, Any] | None:
        """A JSON object; what is not one was cut short, since it is written in one go."""
        try:
            with (self._folder / path).open("rb") as file:
                document = json.loads(file.read(_MAX_JSON))
        except OSError as error:
            self.result.unreadable.append(Unreadable(path, _words(error), judged=False))
            return None
        except (ValueError, RecursionError) as error:
            self.result.problems.append(f"{path}: it is not whole JSON: {error!s:.100}")
            return None
        return document if isinstance(document, dict) else None


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
