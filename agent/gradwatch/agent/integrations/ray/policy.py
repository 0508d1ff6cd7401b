"""The policy that a script gives its callback: checked in the driver, followed by the controller.

What a policy means only the collector's side knows, so the `gradwatch` command is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHECK_SECONDS = 60.0


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A policy file's text, and what the run needs of it: `text`, `policy_hash`, `guard`, `checkpoints`.

    Raises:
        ValueError: something is wrong in it: all of it, a line each.
        OSError: it cannot be read.
    """
    text = Path(path).read_text()
    done = subprocess.run(
        [sys.executable, "-m", "gradwatch.cli", "policy", "check", "--json", os.fspath(path)],
        env={name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")},
        capture_output=True,
        text=True,
        timeout=_CHECK_SECONDS,
        check=False,
    )
    try:
        document = json.loads(done.stdout)
    except ValueError:
        raise ValueError(f"{path} could not be checked: {done.stderr.strip()[-300:]}") from None
    if not document["valid"]:
        problems = [
            f"{one['file']}:{one['line']}: {one['key']}: {one['message']}" for one in document["problems"]
        ]
        raise ValueError("\n".join(problems))
    needed = {name: document[name] for name in ("policy_hash", "guard", "checkpoints")}
    return {"text": text, **needed}


def variables(policy: Mapping[str, Any]) -> dict[str, str]:
    """What a worker's environment tells of it."""
    told = {"GRADWATCH_POLICY_HASH": str(policy["policy_hash"])}
    if policy["guard"] is not None:
        told["GRADWATCH_GUARD"] = json.dumps(policy["guard"])
    if policy["checkpoints"] is not None:
        told["GRADWATCH_CHECKPOINTS_ROOT"] = str(policy["checkpoints"]["root"])
    return told


def sidecar_flags(policy: Mapping[str, Any]) -> tuple[str, ...]:
    """What a sidecar is told of it."""
    checkpoints = policy["checkpoints"]
    if checkpoints is None:
        return ()
    return ("--checkpoints-root", checkpoints["root"], "--checkpoints-layout", checkpoints["layout"])
