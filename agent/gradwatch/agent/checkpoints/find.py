"""Which files and folders are checkpoints: decided by names, in a listing.

Pure. Hidden files and folders (but DCP's `.metadata`), symlinks and the quarantine are none: no
"resume from latest" looks at the former, and what a link leads to is found where it lies.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints.result import Layout

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from gradwatch.agent.checkpoints.listing import Listing


@dataclass(frozen=True)
class Candidate:
    """What by its name is a checkpoint.

    Attributes:
        path: relative to the root; "." if the root is one.
        layout: by its name; what is in it may tell more (a .ckpt need not be Lightning's).
        files: relative to `path`; {"."} for a checkpoint that is one file.
    """

    path: str
    layout: Layout
    files: frozenset[str]

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files."""
        return self.files != frozenset({"."})


# Written last by DCP, when all shards are there.
METADATA = ".metadata"
SHARD_SUFFIX = ".distcp"
TRAINER_STATE = "trainer_state.json"
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_SAFETENSORS = ".safetensors"
_MODEL_FILE = re.compile(
    r"(pytorch_model|model|adapter_model|diffusion_pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?"
)
# The Trainer's, and accelerate's save_state.
_OPTIMIZER_FILE = re.compile(r"optimizer(_\d+)?\.(pt|bin)")
_HF_FOLDER = re.compile(r"checkpoint[-_]\d+")
# One checkpoint in several files: a folder that is named after a step.
_STEP_FOLDER = re.compile(
    r"(.*[-_.])?(global_step|step|iter|iteration|epoch|ckpt|checkpoint)[-_=]?\d+", re.IGNORECASE
)
# For a folder of which it is known that it is a checkpoint, whatever its name.
_AS_IF = "checkpoint-0"
# In the folder of a Ray Train run, beside its checkpoints: each is a folder of any name.
_RAY_REGISTRY = "checkpoint_manager_snapshot.json"
# .bin is anybody's suffix: only a name that says so makes it a checkpoint.
_BIN = re.compile(r".*(model|ckpt|checkpoint|state|optim).*\.bin", re.IGNORECASE)
_SIDE_FILE = re.compile(
    r"(training_args|scheduler|scaler|lr_scheduler)(_\d+)?\.(bin|pt)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|sampler.*\.bin"
)


def find(listing: Listing, layout: Layout = Layout.AUTO) -> list[Candidate]:
    """The checkpoints in a listing, ordered by path.

    Args:
        listing: of the declared root.
        layout: the only one to look for; AUTO for all.
    """
    by_folder: dict[str, set[str]] = defaultdict(set)
    for path in listing.files:
        folder, _, name = path.rpartition("/")
        if not _hidden(path):
            by_folder[folder or "."].add(name)
    folders = _folder_candidates(by_folder, listing)
    found = list(folders.values())
    owned = {file_path(candidate.path, file) for candidate in found for file in candidate.files}
    for folder, names in by_folder.items():
        for name in names:
            path = file_path(folder, name)
            kind = file_layout(name)
            if path not in owned and kind is not None:
                found.append(Candidate(path, kind, frozenset({"."})))
    return sorted(
        (
            candidate
            for candidate in found
            if layout in {Layout.AUTO, candidate.layout} or _matches(candidate, layout)
        ),
        key=lambda candidate: candidate.path,
    )


def at(listing: Listing, path: str) -> Candidate | None:
    """The checkpoint at a path, for somebody who says that it is one; None if nothing there looks like one.

    Args:
        listing: of the folder that `path` is relative to.
        path: of a file or a folder, with any name.
    """
    for candidate in find(listing):
        if candidate.path == path:
            return candidate
    if path in listing.files:
        return Candidate(path, file_layout(path.rpartition("/")[2]) or Layout.TORCH, frozenset({"."}))
    files = {inner for inner in listing.below(path) if not _hidden(inner)}
    layout = folder_layout({inner for inner in files if "/" not in inner}, _AS_IF)
    return None if layout is None else Candidate(path, layout, frozenset(files))


def file_layout(name: str) -> Layout | None:
    """The layout of a file that stands alone, by its name; None if it is no checkpoint."""
    if name.endswith(_SAFETENSORS):
        return Layout.SAFETENSORS
    if name.endswith(".ckpt"):
        return Layout.LIGHTNING
    if not name.endswith(_TORCH_SUFFIXES) or _SIDE_FILE.fullmatch(name):
        return None
    return Layout.TORCH if not name.endswith(".bin") or _BIN.fullmatch(name) else None


def folder_layout(names: Collection[str], folder: str) -> Layout | None:
    """The layout of a folder with these files in it; None if it is not one checkpoint.

    Args:
        names: of the files directly in it.
        folder: its own name.
    """
    if METADATA in names or any(name.endswith(SHARD_SUFFIX) for name in names):
        return Layout.DCP
    models = any(_MODEL_FILE.fullmatch(name) for name in names)
    if TRAINER_STATE in names or (models and any(_OPTIMIZER_FILE.fullmatch(name) for name in names)):
        return Layout.HF
    if _HF_FOLDER.fullmatch(folder) and (models or any(_OPTIMIZER_FILE.fullmatch(name) for name in names)):
        return Layout.HF
    kinds = {file_layout(name) for name in names} - {None}
    if kinds and _STEP_FOLDER.fullmatch(folder):
        return Layout.SAFETENSORS if kinds == {Layout.SAFETENSORS} else Layout.TORCH
    return None


def is_model_file(name: str) -> bool:
    """Whether a file of a Hugging Face folder holds the model, or the index of its shards."""
    return _MODEL_FILE.fullmatch(name) is not None


def is_optimizer_file(name: str) -> bool:
    """Whether a file of a Hugging Face folder holds optimizer state."""
    return _OPTIMIZER_FILE.fullmatch(name) is not None


def is_side_file(name: str) -> bool:
    """Whether a file holds neither parameters nor optimizer state: nobody judges it."""
    return _SIDE_FILE.fullmatch(name) is not None


def _folder_candidates(by_folder: dict[str, set[str]], listing: Listing) -> dict[str, Candidate]:
    runs = {folder for folder, names in by_folder.items() if _RAY_REGISTRY in names}
    layouts = {}
    for folder, names in by_folder.items():
        above, _, name = folder.rpartition("/")
        registered = folder != "." and (above or ".") in runs
        layout = folder_layout(names, _AS_IF if registered else name)
        if layout is not None:
            layouts[folder] = (layout, registered or _owns(folder, layout))
    found = {}
    for folder, (layout, owns) in layouts.items():
        if any(parent in layouts and layouts[parent][1] for parent in _parents(folder)):
            continue  # a part of the folder above it
        files = {path for path in listing.below(folder) if not _hidden(path)}
        if not owns:
            files = {path for path in files if "/" not in path}
        found[folder] = Candidate(folder, layout, frozenset(files))
    return found


def _owns(folder: str, layout: Layout) -> bool:
    """Whether what lies deeper is part of it. A final model lies beside its checkpoints."""
    return layout is Layout.DCP or _STEP_FOLDER.fullmatch(folder.rpartition("/")[2]) is not None


def _matches(candidate: Candidate, layout: Layout) -> bool:
    """Lightning's checkpoints are torch files, and its sharded ones are DCP folders."""
    lightning_folder = candidate.layout is Layout.DCP and candidate.path.endswith(".ckpt")
    return (layout is Layout.TORCH and candidate.layout is Layout.LIGHTNING) or (
        layout is Layout.LIGHTNING and lightning_folder
    )


def _parents(folder: str) -> Iterable[str]:
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        yield folder


def _hidden(path: str) -> bool:
    *folders, name = path.split("/")
    return any(folder.startswith(".") for folder in folders) or (name.startswith(".") and name != METADATA)


def file_path(folder: str, name: str) -> str:
    """The path of a file in a folder; "." for the file, or the folder, that is the whole."""
    if name == ".":
        return folder
    return name if folder == "." else f"{folder}/{name}"
