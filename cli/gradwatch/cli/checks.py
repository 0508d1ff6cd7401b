"""What `gradwatch doctor` looks at."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

from gradwatch.cli.errors import CliError
from gradwatch.cli.source import Api, open_source

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gradwatch.cli.access import Shown
    from gradwatch.cli.source import Source

_TORCH_NEEDED = (2, 6)
_GRPC_PORT = 7700
_HTTP_PORT = 7701


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def all_checks(url: str | None, state_dir: Path, shown: Shown) -> list[Check]:
    """Look at everything; nothing here raises."""
    return [
        _python(),
        _torch(),
        _entry_point(),
        _autoload(os.environ),
        _spool(state_dir),
        _ports(state_dir),
        _collector(url, state_dir, shown),
    ]


def _python() -> Check:
    version = f"{platform.python_version()} at {sys.executable}"
    if sys.platform != "linux":
        return Check("python", ok=False, detail=f"{version}; `gradwatch run` needs Linux, not {sys.platform}")
    return Check("python", ok=True, detail=version)


def _torch() -> Check:
    # Not imported: that takes seconds, and the version is in its metadata.
    if importlib.util.find_spec("torch") is None:
        return Check(
            "torch", ok=False, detail="not installed in this Python: run doctor in the one that trains"
        )
    version = importlib.metadata.version("torch")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < _TORCH_NEEDED:
        return Check("torch", ok=False, detail=f"{version} is too old: 2.6 or newer is needed")
    return Check("torch", ok=True, detail=version)


def _entry_point() -> Check:
    found = [
        entry.value
        for entry in importlib.metadata.entry_points(group="torch.backends")
        if entry.name == "gradwatch"
    ]
    if not found:
        return Check(
            "entry point",
            ok=False,
            detail="torch does not see gradwatch: its metadata is missing; pip install --no-deps gradwatch",
        )
    return Check("entry point", ok=True, detail=found[0])


def _autoload(environ: Mapping[str, str]) -> Check:
    if environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return Check(
            "autoload",
            ok=False,
            detail="TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading gradwatch; unset it",
        )
    return Check("autoload", ok=True, detail="torch loads gradwatch when a run is watched")


def _spool(state_dir: Path) -> Check:
    folder = state_dir / "spool"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return Check(
            "spool", ok=False, detail=f"cannot write {folder}: {error.strerror}; give another --state-dir"
        )
    return Check("spool", ok=True, detail=str(folder))


def _ports(state_dir: Path) -> Check:
    from gradwatch.cli.launcher import collector_state

    if collector_state.is_held(state_dir):
        return Check("ports", ok=True, detail="a collector runs")
    taken = [port for port in (_GRPC_PORT, _HTTP_PORT) if not _is_free(port)]
    if taken:
        return Check(
            "ports", ok=True, detail=f"{', '.join(map(str, taken))} taken: a run takes free ones instead"
        )
    return Check("ports", ok=True, detail=f"{_GRPC_PORT} and {_HTTP_PORT} are free")


def _is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _collector(url: str | None, state_dir: Path, shown: Shown) -> Check:
    from gradwatch.cli.launcher import collector_state

    if url is None and not collector_state.is_held(state_dir):
        return Check("collector", ok=True, detail=f"none runs on {state_dir}: a run starts one")
    try:
        source = open_source(url, state_dir, shown)
        return Check("collector", ok=True, detail=_answer_of(source, state_dir))
    except CliError as error:
        return Check("collector", ok=False, detail=str(error))


def _answer_of(source: Source, state_dir: Path) -> str:
    if not isinstance(source, Api):
        source.jobs()
        return str(state_dir)
    me = source.me()
    if me["identity"] is None:
        return source.url
    return f"{source.url}; it knows you as {me['identity']}, {me['role']} of {', '.join(me['jobs'])}"
