"""Where a node's journals lie: the layout that probe, launcher and sidecar agree on.

A spool is the folder of one run on one node, named to its processes by GRADWATCH_SPOOL::

    SPOOL/
      rank00003-<incarnation>.000000.jsonl   segments of a journal, in order
      rank00003-<incarnation>.progress       how far it has come; locked while its process lives
      launch-<incarnation>.000000.jsonl      what the launcher reports
      sidecar-<incarnation>.000000.jsonl     what the sidecar says of checkpoints
      rank-3.claim                           locked by the process that is rank 3
      alone.claim                            locked by the process that trains without any group
      autoloaded                             some process imported torch with gradwatch in it
      sidecar.lock                           locked by the sidecar that ships this spool
      status.json                            the job as the collector sees it, for the launcher
      order.json                             the collector's newest order for the launcher
      commanded                              a framework's controller takes the orders in the launcher's place
      capsules/                              micro-batches that another rank may replay, and shards of weights

Standard library only: the probe imports this.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

AUTOLOADED = "autoloaded"
SIDECAR_LOCK = "sidecar.lock"
STATUS = "status.json"
ORDER = "order.json"
COMMANDED = "commanded"
CAPSULES = "capsules"
CAPSULE_SUFFIX = ".capsule"

_SEGMENT = re.compile(r"(?P<name>[a-z]+\d*-(?P<incarnation>[0-9a-f]{32}))\.(?P<index>\d{6})\.jsonl")


@dataclass(frozen=True)
class Segment:
    """One file of a journal."""

    name: str
    incarnation: str
    index: int

    @property
    def filename(self) -> str:
        """The file's name in the spool."""
        return f"{self.name}.{self.index:06d}.jsonl"


def parse_segment(filename: str) -> Segment | None:
    """Read a segment's name; None when the file is something else."""
    match = _SEGMENT.fullmatch(filename)
    if match is None:
        return None
    return Segment(match["name"], match["incarnation"], int(match["index"]))


def progress_filename(name: str) -> str:
    """The progress file of the journal called `name`."""
    return f"{name}.progress"


def claim_filename(rank: int | None) -> str:
    """The file whose lock makes a process the only watched one of its rank; None for one that is alone."""
    return "alone.claim" if rank is None else f"rank-{rank}.claim"


def new_incarnation() -> str:
    """128 random bits in hex: the identity of one journal."""
    return secrets.token_hex(16)


def rank_journal_name(rank: int, incarnation: str) -> str:
    """The journal's name for a rank."""
    return f"rank{rank:05d}-{incarnation}"


def launch_journal_name(incarnation: str) -> str:
    """The journal's name for a launcher."""
    return f"launch-{incarnation}"


def sidecar_journal_name(incarnation: str) -> str:
    """The journal's name for a sidecar."""
    return f"sidecar-{incarnation}"


def try_lock(path: Path) -> int | None:
    """Take the exclusive POSIX record lock of `path`, made if absent.

    Returns the open file descriptor that holds it, or None when another live process
    does. A forked child does not inherit the lock, and the kernel drops it with the
    process, however that ends; closing *any* descriptor of the file in this process
    drops it too, so a holder opens the file just once.

    Raises:
        OSError: the file cannot be opened or locked at all.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return None
        raise
    return fd


def is_locked(path: Path) -> bool:
    """Whether a live process other than this one holds the lock of `path`.

    Never call this for a file that this process itself has locked: it would let go.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return True
        raise
    else:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
