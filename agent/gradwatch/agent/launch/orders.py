"""The order that the sidecar leaves in the spool: the launcher's one reader of `order.json`. Pure.

It is the protobuf JSON mapping of `gradwatch.v1.Order` under the fields' own names, where a field that
has its default is left out and a 64-bit number is a string.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any


class Action(str, enum.Enum):
    """What a launcher is to do."""

    START = "ACTION_START"
    STOP = "ACTION_STOP"
    HALT = "ACTION_HALT"
    RELEASE = "ACTION_RELEASE"


@dataclasses.dataclass(frozen=True)
class Order:
    """What the launcher is to do now.

    Attributes:
        id: the decision's; empty for a first start.
        action: what to do.
        generation: to be started, or to be stopped.
        reason: a sentence for people; may be empty.
        resume_path: what to start from; empty for nothing.
        resume_step: its step; None when not known.
        skip_batches: for GRADWATCH_SKIP_BATCHES.
        exclude_node: the host that the job is to go on without; empty for none.
    """

    id: str
    action: Action
    generation: int
    reason: str = ""
    resume_path: str = ""
    resume_step: int | None = None
    skip_batches: int = 0
    exclude_node: str = ""


def parse(data: bytes, *, job: str, launch: str) -> Order | None:
    """Read an order; None when it is not one, not for this launch, or of an action we do not know."""
    try:
        document: dict[str, Any] = json.loads(data)
        if (document.get("job"), document.get("launch")) != (job, launch):
            return None
        step = document.get("resume_step")
        return Order(
            id=str(document.get("id", "")),
            action=Action(document.get("action")),
            generation=int(document.get("generation", 0)),
            reason=str(document.get("reason", "")),
            resume_path=str(document.get("resume_path", "")),
            resume_step=None if step is None else int(step),
            skip_batches=int(document.get("skip_batches", 0)),
            exclude_node=str(document.get("exclude_node", "")),
        )
    except (ValueError, TypeError, AttributeError):
        return None
