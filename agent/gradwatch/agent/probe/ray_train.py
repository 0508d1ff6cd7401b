"""Have a Ray Train driver load our callback: Ray reads a variable when it begins a run.

The variable is set here, in a process that is known to have Gradwatch: Ray refuses to train with a callback
that it cannot import, and the launcher does not know which Python its command runs.

Standard library only, and no Ray: this runs at every `import torch`.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, MutableMapping

VARIABLE = "RAY_TRAIN_CALLBACKS"
CALLBACK = "gradwatch.agent.integrations.ray.callback.WatchCallback"
# Of Ray Train V2: what our callback derives from, and what reads the variable.
_NEEDED = (
    (
        "execution/callback.py",
        ("class WorkerGroupCallback", "class ControllerCallback", "class WorkerCallback"),
    ),
    ("callbacks/env_callback.py", (VARIABLE,)),
)
_TRAINER = "ray.train.torch"
_V2_TRAINER = "ray.train.v2.api.data_parallel_trainer"
OLD_TRAIN = (
    "gradwatch: this script uses Ray Train without its V2 (Ray 2.49 or newer; before 2.51 with "
    "RAY_TRAIN_V2_ENABLED=1): workers on other machines are not watched, and nothing is rolled back\n"
)


def announce(environ: MutableMapping[str, str] = os.environ) -> None:
    """Name our callback to Ray Train, where there is one that takes it.

    Args:
        environ: of this process; what else is named there stays.
    """
    named = [name for name in environ.get(VARIABLE, "").split(",") if name.strip()]
    ray = _found()
    if CALLBACK in named or ray is None:
        return
    if _takes_callbacks(ray):
        environ[VARIABLE] = ",".join([*named, CALLBACK])
    atexit.register(lambda: sys.stderr.write(OLD_TRAIN) if is_old_train(sys.modules) else None)


def is_old_train(modules: Collection[str]) -> bool:
    """Whether the process, with these modules, is the driver of a Ray Train that knows no callbacks."""
    if _TRAINER not in modules or _V2_TRAINER in modules:
        return False
    worker = getattr(sys.modules.get("ray._private.worker"), "global_worker", None)
    # As in ray._private.worker: 0 is a driver, and a worker has another mode.
    return getattr(worker, "mode", None) == 0


def _found() -> Path | None:
    """The folder of the installed Ray."""
    found = importlib.util.find_spec("ray")
    return None if found is None or found.origin is None else Path(found.origin).parent


def _takes_callbacks(ray: Path) -> bool:
    """Whether this Ray has all that the callback is built on: importing it would take a second."""
    folder = ray / "train" / "v2" / "_internal"
    try:
        texts = [(folder / name).read_text() for name, _ in _NEEDED]
    except OSError:
        return False
    return all(word in text for text, (_, words) in zip(texts, _NEEDED, strict=True) for word in words)
