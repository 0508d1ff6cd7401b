"""What is done in the process of a Ray Train worker, before the train function."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gradwatch.agent.checkpoints import remote
from gradwatch.agent.integrations.ray import known

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PIN = "GRADWATCH_RESUME_PATH"
_ROOT = "GRADWATCH_CHECKPOINTS_ROOT"


def prepare(environ: Mapping[str, str]) -> None:
    """Tell the process that it is watched, as the launcher tells a command.

    Args:
        environ: its GRADWATCH_ variables; others that it has are dropped.

    Raises:
        FileNotFoundError: the spool is not on this host.
    """
    if not Path(environ["GRADWATCH_SPOOL"]).is_dir():
        raise FileNotFoundError(f"the spool {environ['GRADWATCH_SPOOL']} is not on this host")
    for name in [name for name in os.environ if name.startswith("GRADWATCH_")]:
        del os.environ[name]
    os.environ.update(environ)
    # torch may have been imported before this process was told.
    import torch  # noqa: F401

    from gradwatch.agent.probe.autoload import autoload

    autoload()


def train_context_ready() -> None:
    """The train function is about to be called.

    What it asks Ray for is the checkpoint that is known good, and what it reports is told with its step.
    """
    import ray
    from ray.train.v2._internal.execution.context import get_train_context

    from gradwatch.agent.probe.activate import active

    context = get_train_context()
    pin = os.environ.get(_PIN)
    if pin and known.why_unknown(ray.__version__) is None:
        resume_from(context, pin)
    probe = active()
    if probe is not None:
        tell_of_reports(context, probe.watcher.saving)


def resume_from(context: Any, pin: str) -> None:
    """Have `ray.train.get_checkpoint()` give this checkpoint, if it is one of the run's.

    Args:
        context: Ray Train's `TrainContext` of this worker.
        pin: the path of the checkpoint, or of a file in it.
    """
    from ray.train import Checkpoint

    storage = context.storage_context
    name = registered_name(pin, storage.experiment_fs_path)
    if name is not None:
        path = storage.build_checkpoint_path_from_name(name)
        context.checkpoint = Checkpoint(path=path, filesystem=storage.storage_filesystem)


def good_checkpoint() -> Any:
    """The checkpoint to resume from: the last that is known good after a rollback, else Ray's newest.

    To be called in the train function, in place of `ray.train.get_checkpoint()`. Uses what Ray Train promises
    to keep, so it also works with a Ray that Gradwatch does not know.

    Returns:
        A `ray.train.Checkpoint`; None to begin afresh.

    Raises:
        RuntimeError: Ray does not know the good checkpoint any more, for which the run was rolled back.
    """
    import ray.train

    pin = os.environ.get(_PIN)
    all_reported = getattr(ray.train, "get_all_reported_checkpoints", None)
    if not pin or all_reported is None:
        # A Ray that has no such function yet is one that we know, and was told the checkpoint.
        return ray.train.get_checkpoint()
    for reported in all_reported():
        path = str(reported.checkpoint.path)
        if f"{remote.without_scheme(pin)}/".startswith(f"{path}/"):
            return reported.checkpoint
    raise RuntimeError(
        f"the run was rolled back to {pin}, and Ray Train does not know that checkpoint; see that "
        "CheckpointConfig(num_to_keep=…) keeps some more of them"
    )


def tell_of_reports(context: Any, saving: Callable[[Callable[[], str]], None]) -> None:
    """Have each checkpoint that the train function reports told under the name that Ray gives it.

    Args:
        context: Ray Train's `TrainContext` of this worker.
        saving: told of each, with what gives its path, before Ray copies it there.
    """
    report, agree = context.report, context._sync_checkpoint_dir_name_across_ranks
    if hasattr(report, "__wrapped__"):
        return
    reports = threading.local()

    @functools.wraps(report)
    def reporting(metrics: Any, checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        reports.one = checkpoint is not None
        return report(metrics, checkpoint, *args, **kwargs)

    @functools.wraps(agree)
    def agreeing(*args: Any, **kwargs: Any) -> Any:
        name = agree(*args, **kwargs)
        if getattr(reports, "one", False):
            folder = PurePosixPath(context.storage_context.experiment_fs_path)
            saving(lambda: told_as(str(folder / name), os.environ.get(_ROOT)))
        return name

    context.report, context._sync_checkpoint_dir_name_across_ranks = reporting, agreeing


def told_as(path: str, root: str | None) -> str:
    """How a checkpoint's path is told: as its URL, if the policy's root is one.

    Args:
        path: as the run's storage calls it.
        root: the policy's; None when there is none.
    """
    if root is None or not remote.is_url(root):
        return path
    below = remote.without_scheme(root)
    return f"{root.rstrip('/')}{path[len(below) :]}" if path.startswith(f"{below}/") else path


def registered_name(path: str, run_folder: str) -> str | None:
    """The name under which Ray knows the checkpoint that a path lies in; None when it is not of that run.

    Args:
        path: of a checkpoint, or of a file in one; or its URL.
        run_folder: the run's folder on its storage, as the storage calls it: without a URL's scheme.
    """
    try:
        below = PurePosixPath(remote.without_scheme(path)).relative_to(PurePosixPath(run_folder))
    except ValueError:
        return None
    return below.parts[0] if below.parts else None
