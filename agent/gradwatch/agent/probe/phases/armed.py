"""After a fault of which no operator or no line is known: look closely for some steps, should it come again.

Then the line of each forward operator is kept (torch's anomaly mode, without its own check), and each node
of the backward pass has a hook: the first one that is given finite gradients and gives others has made them.
That costs about as much as the step itself, so a job in which nothing has happened never does it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import scan
from gradwatch.agent.probe.autopsy.frames import code_of, innermost, named
from gradwatch.agent.probe.parameters import local
from gradwatch.agent.probe.phases import loss_graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.utils.hooks import RemovableHandle

    from gradwatch.agent.probe.autopsy.frames import Line
    from gradwatch.agent.probe.fuses import Fuses
    from gradwatch.agent.probe.phases.loss_pass import LossPass

# The part of the probe, for its fuse.
PART = "armed"
# Backward passes that are looked at so, after each fault; and faults of one process.
PASSES = 16
TIMES = 4
# Where anomaly mode keeps the stack of a node's forward operator, as `traceback.format_stack` gives it.
_STACK = "traceback_"
_FRAME = re.compile(r'File "(.*?)", line (\d+)')


@dataclass(frozen=True)
class Maker:
    """The node that was given finite gradients and gave others.

    Attributes:
        operator: its name.
        line: of the user's code that called its forward operator; None when not known.
        in_the_loss: it lies between the loss and the models.
    """

    operator: str
    line: Line | None
    in_the_loss: bool


class Armed:
    """Looks closely at the backward passes of one process.

    Args:
        fuses: of the process.

    Attributes:
        maker: found in the newest backward pass; None for none.
    """

    def __init__(self, fuses: Fuses) -> None:
        self._fuses = fuses
        self.maker: Maker | None = None
        self._passes_left = 0
        self._times_left = TIMES
        self._handles: list[RemovableHandle] = []
        self._before: tuple[bool, bool] | None = None

    def arm(self) -> None:
        """From the next forward pass on, for some passes."""
        if not self._times_left or self._passes_left or not self._fuses.intact(PART):
            return
        self._times_left -= 1
        self._passes_left = PASSES
        if not torch.is_anomaly_enabled():
            self._before = (False, torch.is_anomaly_check_nan_enabled())
            torch.set_anomaly_enabled(True, False)

    def begins(self, loss: LossPass) -> None:
        """A backward pass begins at these roots. Never raises."""
        self.maker = None
        if self._passes_left:
            self._passes_left -= 1
            self._fuses.call(PART, self._hook_nodes, loss.roots)

    def over(self) -> None:
        """The backward pass is over: nothing stays on the graph. Never raises."""
        self._fuses.clean_up(PART, self._remove_hooks)
        if not self._fuses.intact(PART):
            self._passes_left = 0
        if not self._passes_left:
            self._fuses.clean_up(PART, self._keep_no_lines)

    def _hook_nodes(self, roots: Sequence[Any]) -> None:
        try:
            nodes, of_the_loss = list(loss_graph.walk(roots)), set(_of_the_loss(roots))
        except loss_graph.TooLargeError:
            # So is the next one.
            self._passes_left = 0
            return
        for node in nodes:
            # That of a parameter stays, and would keep its hook.
            if not loss_graph.is_leaf(node):
                self._handles.append(node.register_hook(self._hook(node, in_the_loss=node in of_the_loss)))

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _keep_no_lines(self) -> None:
        before, self._before = self._before, None
        if before is not None and torch.is_anomaly_enabled() and not torch.is_anomaly_check_nan_enabled():
            torch.set_anomaly_enabled(*before)

    def report(self) -> dict[str, Any]:
        """Fields of the `Autopsy` message of the maker; none when there is none."""
        maker = self.maker
        if maker is None:
            return {}
        report: dict[str, Any] = {
            "phase": "PHASE_LOSS" if maker.in_the_loss else "PHASE_BACKWARD",
            "operator": maker.operator,
        }
        if maker.line is not None:
            report |= {"source": named(maker.line), "code": code_of(maker.line)}
        return report

    def _hook(self, node: Any, *, in_the_loss: bool) -> Any:
        name = loss_graph.operator_of(node)
        operator = name if loss_graph.is_python(node) else f"aten.{name}"
        # Of the node itself nothing is kept: its hook would keep it, and it its hook.
        stack: Sequence[str] = node.metadata.get(_STACK) or ()

        def look(given_back: Sequence[Any], came: Sequence[Any]) -> None:
            if self.maker is None and _are_finite(given_back) is False and _are_finite(came):
                self.maker = Maker(operator, _line_of(stack), in_the_loss=in_the_loss)

        def after(given_back: Sequence[Any], came: Sequence[Any]) -> None:
            # Autograd would raise what the look raises into the training.
            self._fuses.call(PART, look, given_back, came)

        return after


def _of_the_loss(roots: Sequence[Any]) -> list[Any]:
    """The nodes above the outputs of watched models; none where there are no such outputs."""
    marked = [node for node in loss_graph.walk(roots) if loss_graph.MARK in node.metadata]
    return loss_graph.around(roots, set(marked))[0] if marked else []


def _are_finite(gradients: Iterable[Any]) -> bool | None:
    """Whether they are, as this rank holds them; None when none is bad and not all are known."""
    facts = [_is_finite(one) for one in gradients if isinstance(one, torch.Tensor)]
    return False if False in facts else None if None in facts else True


def _is_finite(gradient: torch.Tensor) -> bool | None:
    held = local(gradient)
    # Computing with another subclass may be a collective, and a device would be waited for.
    if type(held) is not torch.Tensor or held.device.type != "cpu":
        return None
    return scan.is_finite(held)


def _line_of(stack: Sequence[str]) -> Line | None:
    """The innermost line of the user's own code."""
    frames = [match for entry in stack if (match := _FRAME.search(entry)) is not None]
    return innermost((match[1], int(match[2])) for match in reversed(frames))
