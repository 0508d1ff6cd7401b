"""Journals that other processes write: locks of one's own process are not seen by it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import spool

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

_WRITER = """
import json, sys
from pathlib import Path
from gradwatch.agent.probe.journal import Journal
journal = Journal(Path(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))
print("open", flush=True)
for line in sys.stdin:
    call, arguments = json.loads(line)
    print(json.dumps(getattr(journal, call)(*arguments)), flush=True)
"""


class Writer:
    """A process that holds a real journal open: a rank's, or a launcher's if `rank` is None.

    Use as a context manager; leaving it kills the process, as a SIGKILL would.
    """

    def __init__(self, folder: Path, rank: int | None = 0, **journal_options: int) -> None:
        self.incarnation = spool.new_incarnation()
        if rank is None:
            self.name = spool.launch_journal_name(self.incarnation)
        else:
            self.name = spool.rank_journal_name(rank, self.incarnation)
        self.records = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(folder), self.name, json.dumps(journal_options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "open\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def append(self, kind: str, body: dict[str, Any]) -> bool:
        """Write a record."""
        written = bool(self._call("append", kind, body))
        self.records += written
        return written

    def fault(self, error: str = "boom") -> bool:
        """Write a record of any kind."""
        return self.append("fault", {"part": "scan", "error": error})

    def progress(self, round_: int, **more: Any) -> None:
        """Rewrite the progress file."""
        body = {"incarnation": self.incarnation, "round": round_, "journal_records": self.records, **more}
        self._call("progress", body)

    def kill(self) -> None:
        """SIGKILL the writer."""
        self._process.kill()
        self._process.communicate()

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())
