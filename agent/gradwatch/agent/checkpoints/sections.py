"""Which tensors of a checkpoint are judged, and as what: decided by the keys they lie under.

Judged are state dicts, whole modules and optimizer state. Schedulers, callbacks (Lightning keeps
`best_score=inf`), hyper-parameters, losses and random states are not. A dictionary is a state dict
when it holds tensors and no containers, and a tensor of several elements is judged wherever it lies;
so a training script's own keys need not be known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from gradwatch.agent.checkpoints.result import Section, Step, StepSource
from gradwatch.agent.checkpoints.values import FLOATING, Blobs, Inline, Leaf, Stub, Tensor

MAX_STEP = 2**62
_MAX_DEPTH = 50
_LEAVES = (Tensor, Inline, Blobs)
_CONTAINERS = (dict, list, tuple)

# Below these keys, nothing is judged.
_UNJUDGED = re.compile(
    r"(lr_?)?schedulers?(_states?|_state_dict)?|lr_schedulers?|callbacks?|hyper_?parameters|hparams\w*|datamodule\w*"
    r"|loops?|args|arguments|cfg|config\w*|\w*rng\w*|\w*random_states?|(grad_?|loss_?)?scaler\w*|native_amp\w*"
    r"|MixedPrecision\w*|metrics?|\w*loss(es|_\w+)?|history|logs?|logger|dataloaders?|samplers?|best_\w+|\w*extra_state",
    re.IGNORECASE,
)
_OPTIMIZER = re.compile(
    r"(\w+_)?(optimizers?|optims?|opt)(_\w+)?|fp32_from_fp16_params|fp32_groups|single_partition_of_fp32_groups",
    re.IGNORECASE,
)
STEP_KEYS = ("global_step", "global_steps", "step", "steps", "iteration", "iterations", "iter", "num_updates")
# Buffers as torch.nn and the usual transformers name them; a state dict does not tell them apart.
_BUFFER = re.compile(
    r"(running_(mean|var)|num_batches_tracked|(original_)?inv_freq|position_ids|masked_bias|\w*mask\w*"
    r"|(cos|sin)(_cached)?|freqs_cis|(max|min)_val|zero_point)"
)


@dataclass(frozen=True)
class Named:
    """A tensor that is judged."""

    section: Section
    name: str
    leaf: Leaf

    @property
    def is_step(self) -> bool:
        """Whether its value is the optimizer's count of updates."""
        return self.section is Section.OPTIMIZER and self.name.rpartition(".")[2] == "step"


@dataclass
class Judged:
    """What a saved object holds.

    Attributes:
        tensors: those with floating-point values, in the order of the object.
        steps: those told by plain numbers.
        lightning: whether Lightning wrote it.
    """

    tensors: list[Named] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    lightning: bool = False


def judge(value: Any, *, as_section: Section | None = None) -> Judged:
    """Find what is judged in a saved object.

    Args:
        value: the object, with leaves for tensors.
        as_section: what its file's name says it is; None to go by its keys.
    """
    walk = _Walk()
    if isinstance(value, dict):
        walk.judged.lightning = "pytorch-lightning_version" in value
        walk.find_steps(value)
    if as_section is None:
        walk.visit(value, "", 0)
    elif as_section is Section.OPTIMIZER:
        walk.optimizer(value, "")
    else:
        walk.everything(value, "", as_section)
    return walk.judged


class _Walk:
    def __init__(self) -> None:
        self.judged = Judged()
        # By identity: a hostile pickle can share one list a billion times over, or contain itself.
        self._seen: set[int] = set()

    def find_steps(self, value: dict[Any, Any]) -> None:
        for key in STEP_KEYS:
            step = value.get(key)
            if type(step) is int and step >= 0:
                self.judged.steps.append(Step(StepSource.CHECKPOINT, key, step))

    def visit(self, value: Any, path: str, depth: int) -> None:
        """Look for state dicts and optimizers."""
        if not self._new(value) or depth > _MAX_DEPTH:
            return
        if isinstance(value, _LEAVES):
            # A loose scalar is a loss or a count more often than a parameter.
            if _elements(value) > 1:
                self.everything(value, path, Section.PARAMETERS)
        elif isinstance(value, Stub):
            self._object(value, path, depth)
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                self.visit(inner, _join(path, index), depth + 1)
        elif isinstance(value, dict):
            if _is_optimizer(value):
                self.optimizer(value, path)
            elif _is_state_dict(value):
                self.everything(value, path, Section.PARAMETERS)
            else:
                self._keys(value, path, depth)

    def _object(self, value: Stub, path: str, depth: int) -> None:
        attributes = value.attributes()
        if value.tensor:
            self._seen.discard(id(value))
            self.everything(value, path, Section.PARAMETERS)
        elif "_parameters" in attributes and "_modules" in attributes:
            self._module(attributes, path, depth)
        elif _is_optimizer(attributes):
            self.optimizer(attributes, path)
        else:
            for part in (*value.args, attributes or value.state, value.items, value.mapping):
                self.visit(part, path, depth + 1)

    def _keys(self, value: dict[Any, Any], path: str, depth: int) -> None:
        for key, inner in value.items():
            name = _join(path, key)
            if isinstance(inner, dict) and _is_optimizer(inner):
                self.visit(inner, name, depth + 1)
            elif _UNJUDGED.fullmatch(str(key)):
                continue
            elif _OPTIMIZER.fullmatch(str(key)):
                self.optimizer(inner, name)
            else:
                self.visit(inner, name, depth + 1)

    def optimizer(self, value: Any, path: str) -> None:
        """All tensors of its state; its groups hold hyper-parameters."""
        if isinstance(value, Stub):
            value = value.attributes()
        if isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                if self._new(inner):
                    self.optimizer(inner, _join(path, index))
        elif isinstance(value, dict):
            if _is_optimizer(value):
                value = {"state": value["state"]}
            self.everything(value, path, Section.OPTIMIZER)
            self._optimizer_step(value.get("state"), path)

    def _optimizer_step(self, state: Any, path: str) -> None:
        if isinstance(state, dict):
            steps = [inner.get("step") for inner in state.values() if isinstance(inner, dict)]
            numbers = [int(step) for step in steps if isinstance(step, (int, float)) and 0 <= step < MAX_STEP]
            if numbers:
                self.judged.steps.append(Step(StepSource.OPTIMIZER, _join(path, "state"), max(numbers)))

    def _module(self, attributes: dict[Any, Any], path: str, depth: int) -> None:
        for kind, section in (("_parameters", Section.PARAMETERS), ("_buffers", Section.BUFFERS)):
            self.everything(attributes.get(kind), path, section, told=True)
        modules = attributes.get("_modules")
        if isinstance(modules, dict):
            for name, module in modules.items():
                self.visit(module, _join(path, name), depth + 1)

    def everything(self, value: Any, path: str, section: Section, *, told: bool = False) -> None:
        """All tensors below `value`, those in objects that were not built included (DTensor, ShardedTensor).

        Args:
            value: where to look.
            path: its name.
            section: what they are.
            told: the checkpoint itself tells parameters from buffers.
        """
        waiting = [(value, path)]
        while waiting:
            inner, name = waiting.pop()
            if isinstance(inner, _LEAVES):
                if inner.dtype in FLOATING:
                    buffer = (
                        section is Section.PARAMETERS
                        and not told
                        and _BUFFER.fullmatch(name.rpartition(".")[2])
                    )
                    self.judged.tensors.append(Named(Section.BUFFERS if buffer else section, name, inner))
            elif isinstance(inner, dict) and self._new_or(inner, value):
                below = [
                    (item, _join(name, key))
                    for key, item in inner.items()
                    if not (section is Section.PARAMETERS and _UNJUDGED.fullmatch(str(key)))
                ]
                waiting.extend(reversed(below))
            elif isinstance(inner, (list, tuple)) and self._new_or(inner, value):
                waiting.extend([(item, _join(name, index)) for index, item in enumerate(inner)][::-1])
            elif isinstance(inner, Stub) and self._new_or(inner, value):
                # What lies inside of an object goes by the object's name.
                parts = [*inner.args, inner.attributes() or inner.state, inner.items, inner.mapping]
                waiting.extend((leaf, name) for leaf in _leaves_within(parts))

    def _new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        if isinstance(value, (*_CONTAINERS, Stub)):
            self._seen.add(id(value))
        return True

    def _new_or(self, value: Any, start: Any) -> bool:
        return value is start or self._new(value)


def _leaves_within(parts: list[Any]) -> list[Any]:
    """The tensors below some objects, without their names."""
    seen: set[int] = set()
    found = []
    waiting = parts[::-1]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _LEAVES):
            found.append(value)
        elif isinstance(value, (*_CONTAINERS, Stub)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Stub):
                value = [*value.args, value.state, value.items, value.mapping]
            waiting.extend(reversed(value.values() if isinstance(value, dict) else value))
    return found


def _elements(leaf: Leaf) -> int:
    if isinstance(leaf, Inline):
        return len(leaf.data) // FLOATING[leaf.dtype]
    return math.prod(leaf.size)


def _is_optimizer(value: dict[Any, Any]) -> bool:
    return "state" in value and "param_groups" in value


def _is_state_dict(value: dict[Any, Any]) -> bool:
    held = [inner for key, inner in value.items() if not str(key).endswith("_extra_state")]
    return (
        all(isinstance(key, str) for key in value)
        and any(isinstance(inner, _LEAVES) or _is_tensor(inner) for inner in held)
        and not any(
            isinstance(inner, _CONTAINERS) or (isinstance(inner, Stub) and not inner.tensor) for inner in held
        )
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Stub) and value.tensor


def _join(path: str, key: object) -> str:
    text = str(key) if isinstance(key, (str, int)) else "?"
    return f"{path}.{text}" if path else text
