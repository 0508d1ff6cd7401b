"""Where in the user's model a replay is: in the backward pass, where the forward operator was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

from gradwatch.agent.probe.autopsy.frames import line_below
from gradwatch.agent.probe.parameters import class_name, clean_path

if TYPE_CHECKING:
    from types import CodeType

    from torch.utils.hooks import RemovableHandle

    from gradwatch.agent.probe.autopsy.frames import Line

# Not in every torch; without them an operator of the backward pass has no place.
_sequence_number = getattr(torch.autograd, "_get_sequence_nr", None)
_current_node = getattr(torch._C, "_current_autograd_node", None)


@dataclass(frozen=True)
class Place:
    """Where an operator runs, or ran in the forward pass.

    Attributes:
        module: path in the model; None when not known.
        module_class: its class.
        line: of the user's code; None when not known.
    """

    module: str | None = None
    module_class: str | None = None
    line: Line | None = None


class Places:
    """Follows a replay. Hooks every module of the process, as long as the context lasts.

    Args:
        root: the model.
        outermost: code of the replay, beyond which no line is the model's.
    """

    def __init__(self, root: torch.nn.Module, outermost: CodeType) -> None:
        self._paths = {id(module): clean_path(path) for path, module in root.named_modules()}
        self._outermost = outermost
        self._stack: list[torch.nn.Module] = []
        # By the number that autograd gave to the forward operator's node.
        self._of_nodes: dict[int, Place] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        self._handles = [
            torch_module.register_module_forward_pre_hook(self._enter),
            torch_module.register_module_forward_hook(self._leave, always_call=True),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def here(self) -> Place:
        """The place of the operator under way."""
        line = line_below(self._outermost)
        node = _current_node() if _current_node is not None else None
        if node is not None and not torch.is_grad_enabled():
            forward = self._of_nodes.get(node._sequence_nr(), Place())
            # A backward function in Python has a line of its own.
            return Place(forward.module, forward.module_class, line or forward.line)
        place = Place(*self._module(), line)
        if _sequence_number is not None and (torch.is_grad_enabled() or node is None):
            # The node is made before its operator runs; that of a function in Python before its `forward`,
            # in which no others are made.
            self._of_nodes.setdefault(_sequence_number() - 1, place)
        return place

    def _module(self) -> tuple[str | None, str | None]:
        for module in reversed(self._stack):
            path = self._paths.get(id(module))
            if path is not None:
                return path, class_name(module)
        return None, None

    def _enter(self, module: Any, _args: Any) -> None:
        self._stack.append(module)

    def _leave(self, module: Any, _args: Any, _result: Any) -> None:
        while self._stack and self._stack.pop() is not module:
            pass
