"""`python -m gradwatch.agent.checkpoints.scan PATH… --json`: look at checkpoints, at low priority.

A process of its own: it needs torch, maps files that others write, and may be killed. It prints one
JSON document a line, for each path in turn (see `result`); exit code 0 means that all were printed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import platform
import resource
import signal
import sys
import tempfile
from pathlib import Path

from gradwatch.agent.checkpoints import complete, remote
from gradwatch.agent.checkpoints.result import Completeness, ScanResult

# Beyond what the interpreter and torch have taken: a pickle that wants more gets a MemoryError.
_MEMORY = 2 << 30
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273}
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13
_PR_SET_PDEATHSIG = 1


def scan_main(arguments: list[str] | None = None) -> int:
    """Scan the paths of the command line and print the results.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m gradwatch.agent.checkpoints.scan")
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--json", action="store_true", help="one line for each, for programs")
    parser.add_argument("--parent", type=int, help="end with this process")
    parser.add_argument("--scratch", type=Path, help="where what a URL names is fetched to")
    options = parser.parse_args(arguments)
    be_humble(options.parent)
    import torch

    torch.set_num_threads(1)
    _limit_memory()
    for path in options.paths:
        document = _scan(path, options.scratch or Path(tempfile.gettempdir())).to_json()
        sys.stdout.write(json.dumps(document, indent=None if options.json else 2) + "\n")
        sys.stdout.flush()
    return 0


def be_humble(parent: int | None) -> None:
    """Take the lowest priority for processor and disk, and end with the parent. Best effort."""
    with contextlib.suppress(OSError):
        os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        number = _IOPRIO_SET.get(platform.machine())
        if number is not None:
            libc.syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
        if parent is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        sys.exit(1)


def _scan(path: str, scratch: Path) -> ScanResult:
    try:
        if remote.is_url(path):
            result = _fetched(path, scratch)
        else:
            from gradwatch.agent.checkpoints.look import look

            result = look(Path(os.path.abspath(path)))  # noqa: PTH100 - resolve() would follow a symlink
        return dataclasses.replace(result, path=path)
    except OSError as error:
        return ScanResult(path, error=f"cannot read it: {error.strerror or error}")
    except MemoryError:
        return ScanResult(path, error="it wants more memory than a scan may take")
    except Exception as error:
        return ScanResult(path, error=f"the scan failed: {type(error).__name__}: {error!s:.300}")


def _fetched(url: str, scratch: Path) -> ScanResult:
    """Look at what a URL names, if it held still while it was fetched."""
    from gradwatch.agent.checkpoints.look import look

    before = remote.take(url).files
    with remote.fetched(url, before, scratch) as local:
        result = look(local)
    change = complete.changed(before, remote.take(url).files)
    if change is None:
        return result
    return ScanResult(url, layout=result.layout, completeness=Completeness.IN_FLIGHT, reason=change)


def _limit_memory() -> None:
    """Bound private memory; the file system's cache does not count."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        taken = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = taken + _MEMORY
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    sys.exit(scan_main())
