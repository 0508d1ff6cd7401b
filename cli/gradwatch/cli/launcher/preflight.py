"""What is checked before the command starts, so that wrong use costs no training time."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.cli.access import check_collector, is_loopback
from gradwatch.cli.errors import UsageError
from gradwatch.cli.launcher import collector_state, resume

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.cli.launcher.config import RunConfig

NOT_FOUND = 127
NOT_EXECUTABLE = 126
_MAX_PORT = 65535


def check(config: RunConfig) -> None:
    """Refuse what cannot work.

    Raises:
        UsageError: the report cannot be written, an address is none, a port is taken, TLS or the token
            that an address needs is missing, the identities file is of no use, or `{resume}` stands where it
            cannot.
    """
    refused = resume.why_refused(config.command)
    if refused is not None:
        raise UsageError(refused)
    if config.report is not None:
        _check_report(config.report)
    if not config.sidecar and config.http is not None:
        raise UsageError("--http is for the collector that runs by itself here, and --no-sidecar starts none")
    if config.collector is not None:
        parse_address(config.collector, "--collector")
        if config.sidecar:
            check_collector(config.collector, config.access)
        if config.http is not None:
            raise UsageError("--http is for the collector that runs by itself here: leave out --collector")
    if config.http is not None:
        _check_http(config.http, config)
    if config.identities is not None and config.collector is None:
        _check_identities(config.identities, config)


def why_not_runnable(name: str, environ: Mapping[str, str]) -> tuple[int, str] | None:
    """Tell whether a command can be started at all.

    Returns:
        The exit code a shell would give, and what is wrong; None when it can be started.
    """
    path = environ.get("PATH", os.defpath)
    if shutil.which(name, path=path) is not None:
        return None
    if os.sep in name:
        candidates = [Path(name)]
    else:
        candidates = [Path(folder) / name for folder in path.split(os.pathsep) if folder]
    for candidate in candidates:
        if candidate.is_dir() and os.sep in name:
            return NOT_EXECUTABLE, f"{candidate} is a folder, not a command"
        if candidate.is_file():
            return NOT_EXECUTABLE, f"{candidate} is not executable; chmod +x it, or name its interpreter"
    where = "there is no such file" if os.sep in name else "it is in no folder of PATH"
    return NOT_FOUND, f"command not found: {name} ({where})"


def parse_address(text: str, flag: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        UsageError: it is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise UsageError(f"{flag}: {text!r} is not HOST:PORT, such as 127.0.0.1:7700")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _check_report(path: Path) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        # Renaming into place needs the folder; that is what must be writable.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UsageError(
            f"--report: cannot write {path}: {error}. Name a file in a writable folder"
        ) from None


def _check_identities(path: Path, config: RunConfig) -> None:
    from gradwatch.collector.access.config import Access
    from gradwatch.collector.errors import AccessError

    if config.access.token_file is None:
        raise UsageError("--identities wants --token-file too: the run's own sidecar shows that token")
    try:
        Access(identities=path).known()
    except AccessError as error:
        raise UsageError(str(error)) from None


def _check_http(text: str, config: RunConfig) -> None:
    host, port = parse_address(text, "--http")
    access = config.access
    if not is_loopback(host) and None in {access.cert, access.key, access.token_file}:
        raise UsageError(
            f"--http: {host} is not a loopback address: others could reach it, which needs TLS and a token. "
            "Give --tls-cert, --tls-key and --token-file, or a loopback address such as 127.0.0.1"
        )
    if collector_state.is_held(config.state_dir):
        # Ours will be the one that runs already; the launcher says when it is elsewhere.
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UsageError(f"--http: cannot listen on {text}: {error.strerror}. Name a free port") from None
