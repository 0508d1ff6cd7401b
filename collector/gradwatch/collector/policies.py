"""The policy files in force, by job: read at first need, and again when they change.

A job's policy is the file that `STATE_DIR/policies/JOB.json` names, which `gradwatch run --policy`
leaves there, else the collector's own. A file that does not load leaves the policy before it in force.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.collector.policy.problems import Problem
from gradwatch.collector.policy.reload import InForce, reload

if TYPE_CHECKING:
    from gradwatch.collector.policy.model import Policy

_log = logging.getLogger(__name__)

FOLDER = "policies"
_MAX_BYTES = 1 << 20


class _Stamp(NamedTuple):
    """What tells one version of a file from another."""

    inode: int
    size: int
    mtime_ns: int


class PolicyBook:
    """Knows each job's policy.

    Args:
        state_dir: the collector's.
        default: the policy file of jobs that have none of their own; None for none.
    """

    def __init__(self, state_dir: Path, default: Path | None = None) -> None:
        self._folder = state_dir / FOLDER
        self._default = default
        self._files: dict[str, Path | None] = {}
        self._read: dict[Path, tuple[_Stamp | None, InForce]] = {}

    def policy_of(self, job: str) -> Policy | None:
        """The policy in force for a job."""
        in_force = self.in_force(job)
        return None if in_force is None else in_force.policy

    def in_force(self, job: str) -> InForce | None:
        """The same, with its hash and how the newest attempt to load it went; None when it has none."""
        if job not in self._files:
            self._files[job] = self._file_of(job)
        file = self._files[job]
        if file is None:
            return None
        if file not in self._read:
            self._load(file)
        return self._read[file][1]

    def refresh(self) -> set[str]:
        """Look at all files again; returns the jobs whose policy is another now, or does not load."""
        before = {job: self.in_force(job) for job in self._files}
        for job in self._files:
            self._files[job] = self._file_of(job)
        for file in {file for file in self._files.values() if file is not None}:
            if file not in self._read or _stamp(file) != self._read[file][0]:
                self._load(file)
        return {job for job, known in before.items() if self.in_force(job) != known}

    @property
    def last_reload_successful(self) -> bool:
        """Whether every file is the one in force."""
        return all(in_force.last_reload_successful for _, in_force in self._read.values())

    def _file_of(self, job: str) -> Path | None:
        try:
            named = json.loads((self._folder / f"{job}.json").read_bytes())["file"]
            return Path(str(named))
        except FileNotFoundError:
            return self._default
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("the policy of job %s cannot be found: %s", job, error)
            return self._default

    def _load(self, file: Path) -> None:
        known = self._read.get(file, (None, InForce()))[1]
        stamp = _stamp(file)
        try:
            with file.open("rb") as opened:
                source = opened.read(_MAX_BYTES)
        except OSError as error:
            problem = Problem(str(file), 1, "", f"cannot be read: {error.strerror}")
            new = InForce(known.policy, known.hash, (problem,))
        else:
            new = reload(known, source, str(file))
        self._read[file] = (stamp, new)
        if new.problems:
            kept = "the one before stays in force" if new.policy is not None else "none is in force"
            _log.error("policy %s does not load, %s: %s", file, kept, new.problems[0])
        elif new.hash != known.hash:
            _log.info("policy %s is in force: %s", file, new.hash)


def _stamp(file: Path) -> _Stamp | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return _Stamp(status.st_ino, status.st_size, status.st_mtime_ns)
