"""How workers learn what to resume, and which path is never used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.agent.checkpoints import remote

if TYPE_CHECKING:
    from gradwatch.agent.launch.orders import Order

VARIABLES = ("GRADWATCH_RESUME_PATH", "GRADWATCH_RESUME_STEP", "GRADWATCH_SKIP_BATCHES")


def variables(order: Order | None) -> dict[str, str]:
    """What the environment tells of an order's checkpoint; nothing when there is none."""
    if order is None or not order.resume_path:
        return {}
    told = {"GRADWATCH_RESUME_PATH": order.resume_path}
    if order.resume_step is not None:
        told["GRADWATCH_RESUME_STEP"] = str(order.resume_step)
    if order.skip_batches > 0:
        told["GRADWATCH_SKIP_BATCHES"] = str(order.skip_batches)
    return told


def why_not_usable(path: str, root: str | None) -> str | None:
    """Why a path that came over the network is not used; None when it may be.

    Args:
        path: of the checkpoint.
        root: `checkpoints.root` of the local policy file; None when it has none.
    """
    if root is None:
        return f"the policy declares no checkpoints.root, so {path} is not resumed from"
    if remote.is_url(root):
        # Whether it is there is for who loads it to find out.
        below = path.startswith(f"{root.rstrip('/')}/") and ".." not in path.split("/")
        return (
            None
            if below
            else f"{path} does not lie below checkpoints.root, {root}, so it is not resumed from"
        )
    try:
        real, real_root = Path(path).resolve(), Path(root).resolve()
        if not Path(path).is_absolute() or real_root not in real.parents:
            return f"{path} does not lie below checkpoints.root, {root}, so it is not resumed from"
        if not real.exists():
            return f"{path} is not there, or not on this host: every host must see it at the same path"
    except (OSError, ValueError, RuntimeError) as error:
        return f"{path} cannot be looked at: {error}"
    return None
