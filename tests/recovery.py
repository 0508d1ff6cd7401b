"""Jobs that are to be healed: a policy file, the training of `tests/training/resumable.py`, and its fault."""

from __future__ import annotations

import os
import re
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradwatch.agent.sidecar.cursor import replace_file
from gradwatch.cli.launcher import collector_state
from tests.ranks import REPOSITORY

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from typing_extensions import Self

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*TORCHRUN, "--standalone", "--nproc-per-node"]
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
QUARANTINE = ".gradwatch-quarantine"

POLICY = """\
apiVersion: gradwatch/v1
mode: enforce
rules:
  - name: go-back
    match: {match}
    action: rollback
checkpoints:
  root: {root}
budgets:
{budgets}
"""
BUDGETS = {"job": 5, "same_first_bad_step": 1, "no_progress": 3}


def write_policy(path: Path, root: Path, *, match: str = "{}", budgets: Mapping[str, int] = BUDGETS) -> Path:
    """A policy that goes back to a checkpoint in `root`, at once by default."""
    lines = "\n".join(f"  - {{scope: {scope}, max: {most}}}" for scope, most in budgets.items())
    path.write_text(POLICY.format(match=match, root=root, budgets=lines))
    return path


@dataclass
class Place:
    """The folders of one job.

    Attributes:
        checkpoints: made.
        began: one line per process start that got to its first update: time, and step it began at.
    """

    folder: Path
    checkpoints: Path = field(init=False)
    marker: Path = field(init=False)
    gate: Path = field(init=False)
    weights: Path = field(init=False)
    began: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoints = self.folder / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.marker = self.folder / "marker"
        self.gate = self.folder / "gate"
        self.weights = self.folder / "weights.pt"
        self.began = self.folder / "began"

    def arguments(self, *more: object) -> list[object]:
        """What every training script of this kind takes."""
        return [
            *("--folder", self.checkpoints, "--weights", self.weights),
            *("--marker", self.marker, "--gate", self.gate),
            *more,
        ]

    def training(self, *more: object) -> list[object]:
        """Arguments for torchrun: the training, which is told what to resume."""
        module = ["-m", "tests.training.resumable"]
        return [*module, *self.arguments("--began", self.began, "--resume", "{resume}", *more)]

    @property
    def strikes(self) -> int:
        """How often the fault has struck."""
        return self.marker.stat().st_size if self.marker.exists() else 0

    @property
    def beginnings(self) -> list[tuple[float, int]]:
        """When a process of rank 0 made its first update, and at which step it began."""
        if not self.began.exists():
            return []
        rows = (line.split() for line in self.began.read_text().splitlines())
        return [(float(at), int(step)) for at, step in rows]

    def quarantined(self) -> list[Path]:
        """Where what was set aside lies, without the manifests."""
        found = (self.checkpoints / QUARANTINE).rglob("*")
        return sorted(path for path in found if path.is_file() and path.name != "manifest.json")


class Gate:
    """Keeps a file up to date with the step of the newest checkpoint that the collector calls good.

    A fault that waits for it strikes no sooner than there is something to go back to, however fast the
    training runs and however slow the machine is.

    Args:
        job: whose.
        path: the file.
        url: gives the collector's HTTP address, or None while it has none.
    """

    def __init__(
        self,
        job: str,
        path: Path,
        url: Callable[[], str | None],
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._value = re.compile(
            rf'^gradwatch_last_good_checkpoint_step{{training_job="{re.escape(job)}"}} (\S+)$', re.MULTILINE
        )
        self._path, self._url, self._tls = path, url, tls
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._done.wait(0.05):
            found = self._value.search(self._metrics())
            if found is not None:
                replace_file(self._path, str(int(float(found[1]))).encode())

    def _metrics(self) -> str:
        url = self._url()
        if url is None:
            return ""
        request = urllib.request.Request(f"{url}/metrics", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=5, context=self._tls) as answer:
                return answer.read().decode()
        except (OSError, urllib.error.URLError):
            return ""  # killed, and not yet back


def embedded(state_dir: Path) -> Callable[[], str | None]:
    """The address of the collector that runs along with a launcher."""

    def url() -> str | None:
        found = collector_state.ready(state_dir)
        return None if found is None else found.http

    return url


def environment(**more: str) -> dict[str, str]:
    """This process's, without what would steer the command."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")}
    return env | ENVIRONMENT | more


def performed(report: dict[str, Any], action: str = "rollback") -> list[dict[str, Any]]:
    """The report's decisions of that kind that were performed."""
    return [one for one in report["decisions"] if (one["action"], one["outcome"]) == (action, "performed")]
