"""The policy that a run was given: read before the command starts, and named to the collector."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from gradwatch.agent.sidecar.cursor import replace_file
from gradwatch.cli.errors import UsageError
from gradwatch.collector.policies import FOLDER
from gradwatch.collector.policy.document import guard_setting, load_policy, policy_hash
from gradwatch.collector.policy.problems import PolicyError

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.collector.policy.model import Checkpoints


@dataclasses.dataclass(frozen=True)
class RunPolicy:
    """What the launcher needs of a policy.

    Attributes:
        file: absolute.
        hash: of what it says.
        guard: for GRADWATCH_GUARD; None when there is nothing to tell.
        checkpoints: where they are; None when the policy does not say.
    """

    file: Path
    hash: str
    guard: dict[str, Any] | None
    checkpoints: Checkpoints | None


def read(path: Path) -> RunPolicy:
    """Read and check a policy file.

    Raises:
        UsageError: it cannot be read, or something is wrong in it: all of it, with file, line and key.
    """
    try:
        policy = load_policy(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"--policy: {path} cannot be read: {error.strerror}") from None
    except PolicyError as error:
        raise UsageError("\ngradwatch: ".join(str(error).splitlines())) from None
    return RunPolicy(path.absolute(), policy_hash(policy), guard_setting(policy), policy.checkpoints)


def announce(state_dir: Path, job: str, policy: RunPolicy | None) -> None:
    """Tell the collector of a state folder which policy file is the job's; None for none.

    Raises:
        OSError: it cannot be told.
    """
    path = state_dir / FOLDER / f"{job}.json"
    if policy is None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"file": str(policy.file)}).encode())
