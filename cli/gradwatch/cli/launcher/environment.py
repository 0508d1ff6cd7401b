"""What the command is told through its environment, and what its job is called. Pure."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import PurePath
from typing import TYPE_CHECKING

from gradwatch.agent.launch import resume
from gradwatch.agent.probe.node import VARIABLE as NODE

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gradwatch.cli.launcher.policy_file import RunPolicy

# Flags of this launcher: one that the command starts in turn must not take them for its own.
_OURS = (
    "GRADWATCH_DRAIN_TIMEOUT",
    "GRADWATCH_HTTP",
    "GRADWATCH_HTTP_TLS_CA",
    "GRADWATCH_IDENTITIES",
    "GRADWATCH_NO_SIDECAR",
    "GRADWATCH_ON_ROLLBACK",
    "GRADWATCH_POLICY",
    "GRADWATCH_QUIET",
    "GRADWATCH_REPORT",
    "GRADWATCH_REQUIRE_WATCH",
    "GRADWATCH_TLS_CA",
    "GRADWATCH_TLS_CERT",
    "GRADWATCH_TLS_KEY",
    "GRADWATCH_TOKEN_FILE",
    "GRADWATCH_WEBHOOK",
    "GRADWATCH_WEBHOOK_SECRET_FILE",
)
_AUTOPSY = "GRADWATCH_AUTOPSY"
_GUARD = "GRADWATCH_GUARD"
_ROOT = "GRADWATCH_CHECKPOINTS_ROOT"
# A framework's controller that the command starts takes the orders by the same policy.
_POLICY_HASH = "GRADWATCH_POLICY_HASH"
_JOB_CHARACTERS = 128


def for_command(
    environ: Mapping[str, str],
    *,
    spool: Path | None,
    job: str,
    policy: RunPolicy | None = None,
    replica_check_every: int | None = None,
    autopsy: bool = True,
) -> dict[str, str]:
    """The command's environment.

    Args:
        environ: the launcher's own.
        spool: where the probe writes; None when the job runs unwatched.
        job: the job's name.
        replica_check_every: rounds between two checksums of the parameters; None leaves it as it is.
        policy: the job's; its guard is told to the probe, and only our own orders say what to resume.
        autopsy: bad micro-batches are replayed.
    """
    env = {name: value for name, value in environ.items() if name not in _OURS}
    nested = is_nested(environ)
    if spool is None:
        # Else the probe would write for a launcher further out, under its job's name.
        env.pop("GRADWATCH_SPOOL", None)
        return env
    env["GRADWATCH_SPOOL"] = str(spool)
    env["GRADWATCH_JOB"] = job
    if nested or "GRADWATCH_GENERATION" not in env:
        env["GRADWATCH_GENERATION"] = "0"
    if nested or policy is not None:
        for name in (_GUARD, _ROOT, _POLICY_HASH, *resume.VARIABLES):
            env.pop(name, None)
    if policy is not None:
        env[_POLICY_HASH] = policy.hash
    if policy is not None and policy.guard is not None:
        env[_GUARD] = json.dumps(policy.guard)
    if policy is not None and policy.checkpoints is not None:
        # Ranks that load in process take no path from outside of it.
        env[_ROOT] = policy.checkpoints.root
    if replica_check_every is not None:
        env["GRADWATCH_REPLICA_CHECK_EVERY"] = str(replica_check_every)
    env[_AUTOPSY] = "on" if autopsy else "off"
    # torchrun's restarts read rendezvous keys of the attempt before (pytorch issue 135712).
    env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return env


def generation(environ: Mapping[str, str]) -> int:
    """The generation that `for_command` hands on."""
    value = "" if is_nested(environ) else environ.get("GRADWATCH_GENERATION", "")
    return int(value) if value.isdigit() else 0


def is_nested(environ: Mapping[str, str]) -> bool:
    """Whether another `gradwatch run` started us: its job and generation are not ours."""
    return "GRADWATCH_SPOOL" in environ


def for_child(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of our own sidecar and collector: all but the node's name is in their arguments.

    They run in another working directory, so that no module of the user's can be taken
    for one of theirs; relative folders in PYTHONPATH are made absolute for that.
    """
    kept = {name for name in environ if not name.startswith("GRADWATCH_")} | {NODE}
    env = {name: value for name, value in environ.items() if name in kept}
    if env.get("PYTHONPATH"):
        folders = env["PYTHONPATH"].split(os.pathsep)
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in folders if folder)  # noqa: PTH100 - the text as it is, symlinks and all
    return env


def default_job(command: Sequence[str], environ: Mapping[str, str], now: dt.datetime, random: str) -> str:
    """Name a job that the user did not name: Slurm's name and id, else the script and the time.

    Args:
        command: what is run.
        environ: the launcher's environment.
        now: the time, for people.
        random: a few characters that tell two starts within a second apart.
    """
    slurm_id = environ.get("SLURM_JOB_ID")
    if slurm_id:
        return job_name(f"{environ.get('SLURM_JOB_NAME') or 'slurm'}-{slurm_id}")
    return job_name(f"{_script_stem(command)}-{now:%Y%m%d-%H%M%S}-{random}")


def job_name(text: str) -> str:
    """Make a name that fits labels, paths and URLs."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:_JOB_CHARACTERS] or "job"


def run_id(now: dt.datetime, random: str) -> str:
    """The name of a run's folder; sorts by start."""
    return f"{now:%Y%m%d-%H%M%S}-{random}"


def _script_stem(command: Sequence[str]) -> str:
    """`train` for `torchrun --nproc-per-node 4 src/train.py`, `pkg.train` for `python -m pkg.train`."""
    for argument in command:
        if argument.endswith(".py"):
            return PurePath(argument).stem
    # The first -m is the launcher's when there are two (`python -m torch.distributed.run -m train`).
    modules = [after for flag, after in itertools.pairwise(command) if flag == "-m"]
    return modules[-1] if modules else PurePath(command[0]).stem
