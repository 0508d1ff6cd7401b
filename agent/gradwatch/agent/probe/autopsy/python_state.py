"""The state of Python as at the start of a forward pass: put back where the pass is replayed.

Attributes of the user's modules, and what their code reads from outside (`reach.py`), as long as it is plain:
numbers, strings, containers of such, objects that have nothing but such. References and shallow copies, since
they are taken in every pass. What cannot be known is a doubt, in words.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import replica
from gradwatch.agent.probe.autopsy.kept_values import (
    CONTAINERS,
    MISSING,
    SKIPPED,
    Held,
    copy_contents,
    decoded,
    encoded,
    generator_state,
    held,
    is_as_sampled,
    is_known,
    kind,
    parts,
    plainly,
    put_back,
    sample_of,
    set_generator,
    version,
    without_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gradwatch.agent.probe.autopsy.holders import Holder

_MAX_DOUBTS = 12


@dataclass
class State:
    """As it was."""

    inventory: Inventory
    values: list[tuple[Any, ...]]
    contents: list[tuple[Any, Any]]
    training: list[bool]
    dropout: list[float]
    buffers: list[torch.Tensor | None]
    versions: list[int]
    samples: list[torch.Tensor | None]
    generators: list[Any]
    forward: Any
    _told: list[str] | None = None

    def restore(self) -> None:
        """Put all of it back."""
        inventory = self.inventory
        for holder, values in zip(inventory.holders, self.values, strict=True):
            holder.write([plainly(value) for value in values])
        for container, content in self.contents:
            put_back(container, content)
        for variables, training in zip(inventory.modules, self.training, strict=True):
            variables["training"] = training
        for variables, p in zip(inventory.dropouts, self.dropout, strict=True):
            variables["p"] = p
        for (variables, name), buffer in zip(inventory.buffers, self.buffers, strict=True):
            if buffer is not MISSING and variables.get(name) is not buffer:
                variables[name] = buffer
        for generator, state in zip(inventory.generators, self.generators, strict=True):
            set_generator(generator, state)
        own = inventory.root
        if self.forward is not own.get("forward"):
            own.pop("forward", None)
            if self.forward is not None:
                own["forward"] = self.forward

    def doubts(self) -> list[str]:
        """What of it is not known, or cannot be put back: phrases. To be asked before `restore`."""
        if self._told is not None:
            return self._told
        phrases = [*self.inventory.doubts, *self._of_names(), *self._of_contents(), *self._of_buffers()]
        phrases += [f"{name} was changed" for name, has_changed in self.inventory.baseline if has_changed()]
        return list(dict.fromkeys(phrases))[:_MAX_DOUBTS]

    def _of_names(self) -> Iterator[str]:
        kept = {id(container) for container, _ in self.contents}
        for holder, values in zip(self.inventory.holders, self.values, strict=True):
            for place, value in enumerate(values):
                if isinstance(value, Held) and not value.is_as_it_was:
                    yield f"{holder.where} keeps a tensor that has changed ({holder.names[place]})"
                elif not is_known(value, kept, self.inventory.known):
                    yield holder.phrase(place, kind(value))

    def _of_contents(self) -> Iterator[str]:
        kept = {id(container) for container, _ in self.contents}
        for container, content in self.contents:
            for part in parts(content):
                if isinstance(part, Held) and not part.is_as_it_was:
                    yield f"a {kind(container)} holds a tensor that has changed"
                elif not is_known(part, kept, self.inventory.known):
                    yield f"a {kind(container)} holds a {kind(part)}"

    def _of_buffers(self) -> Iterator[str]:
        of_buffers = zip(self.inventory.buffer_names, self.buffers, self.versions, self.samples, strict=True)
        for (name, harmless), buffer, then, sample in of_buffers:
            if buffer is MISSING:
                yield f"buffer {name} is a part of a graph, and was not kept"
            elif buffer is None or harmless():
                continue
            elif version(buffer) != then or not is_as_sampled(buffer, sample):
                yield f"buffer {name} was changed in place"

    def hidden(self) -> list[str]:
        """What may have been otherwise in the pass though nothing tells of it: phrases.

        Where something that the pass made is finite, and comes again to the bit, it has not been.
        """
        buffers = [
            f"its code may read buffer {name}, which can be written to unseen"
            for (name, harmless), buffer in zip(self.inventory.buffer_names, self.buffers, strict=True)
            if buffer is not None and not harmless()
        ]
        return [*self.inventory.hidden, *buffers][:_MAX_DOUBTS]

    @property
    def replaced_forward(self) -> bool:
        """Whether something else ran in place of the model's own forward."""
        ran = self.forward
        if ran is None:
            return False
        own = self.inventory.forward
        return not (isinstance(ran, types.MethodType) and ran.__func__ is own)

    def plain(self) -> dict[str, Any]:
        """What of it another process of the same program can put in place of its own."""
        contents = {id(container): content for container, content in self.contents}
        inventory = self.inventory
        return {
            "names": {
                holder.key: [
                    [name, encoded(value, contents)] for name, value in zip(holder.names, values, strict=True)
                ]
                for holder, values in zip(inventory.holders, self.values, strict=True)
            },
            "replaced": self.replaced_forward,
            "tensors": self._sums(),
            "training": self.training,
            "dropout": self.dropout,
            "generators": [
                state if isinstance(state, torch.Tensor) else encoded(state, {}) for state in self.generators
            ],
        }

    def _sums(self) -> list[tuple[str, int]]:
        """Checksums of tensors that modules keep beside their parameters, each with what tells where."""
        inventory = self.inventory
        kept = [
            (f"buffer {name}", buffer)
            for (name, harmless), buffer in zip(inventory.buffer_names, self.buffers, strict=True)
            if buffer is not None and buffer is not MISSING and not harmless()
        ]
        for holder, values in zip(inventory.holders, self.values, strict=True):
            kept += [(f"{holder.key} {place}", plainly(value)) for place, value in enumerate(values)]
        for number, (_, content) in enumerate(self.contents):
            kept += [(f"container {number}", plainly(part)) for part in parts(content)]
        return [
            (where, int(replica.bits(value)))
            for where, value in kept
            if type(value) is torch.Tensor and value.layout == torch.strided
        ]

    def take_over(self, plain: dict[str, Any]) -> list[str]:
        """Become what another process gave by `plain`, as far as it can be; phrases of what differs."""
        self._told = self.doubts()
        if plain["names"].keys() != {holder.key for holder in self.inventory.holders}:
            return ["what its code reads is not the same on both ranks"]
        phrases = []
        if plain["replaced"] != self.replaced_forward:
            phrases.append("something else ran in place of its forward on the other rank")
        if plain["tensors"] != self._sums():
            phrases.append("tensors that its modules keep are not the same on both ranks")
        self.contents = []
        for number, holder in enumerate(self.inventory.holders):
            given = dict(map(tuple, plain["names"][holder.key]))
            if given.keys() == set(holder.names):
                self.values[number] = self._taken_over(holder, self.values[number], given)
            else:
                phrases.append(f"{holder.where} has other attributes on the other rank")
        for own, other in ((self.training, plain["training"]), (self.dropout, plain["dropout"])):
            if len(own) != len(other):
                return [*phrases, "the model has other modules on the other rank"]
            own[:] = other
        if len(self.generators) == len(plain["generators"]):
            self.generators = [
                state if isinstance(state, torch.Tensor) else decoded(state) for state in plain["generators"]
            ]
        return phrases

    def _taken_over(self, holder: Holder, values: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...]:
        taken = list(values)
        for place, name in enumerate(holder.names):
            if given[name][0] == SKIPPED:
                continue
            theirs = decoded(given[name])
            if type(taken[place]) in CONTAINERS and type(theirs) is type(taken[place]):
                # The same container, which others may hold, too.
                self.contents.append((taken[place], theirs))
            else:
                taken[place] = theirs
        return tuple(taken)


@dataclass
class Inventory:
    """What is kept of a model in each pass.

    Attributes:
        holders: of names.
        modules: attributes of all modules to which it may matter whether they train.
        dropouts: of those with a probability.
        buffers: where each is kept.
        buffer_names: each with what tells whether a change does not matter.
        generators: whose state is kept.
        known: ids of objects that are kept as holders.
        baseline: what tells whether something else has changed since the inventory.
        doubts: what cannot be known.
        hidden: what may change with no sign that is kept.
        sampled: by buffer, whether some of its elements are copied in each pass.
        root: attributes of the model.
        forward: of the model's class.
        draws: its code may draw from Python's random numbers, for all that is known.
    """

    root: dict[str, Any]
    forward: Any
    holders: list[Holder] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    dropouts: list[dict[str, Any]] = field(default_factory=list)
    buffers: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    buffer_names: list[tuple[str, Callable[[], bool]]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    baseline: list[tuple[str, Callable[[], bool]]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    draws: bool = True

    def take(self, *, strongly: bool = False) -> State:
        """The state as it is now.

        Args:
            strongly: large tensors are kept alive.

        Raises:
            KeyError: the inventory is out of date.
            ValueError: likewise.
        """
        values = [holder.read() for holder in self.holders]
        contents: list[tuple[Any, Any]] = []
        for holder, of_holder in zip(self.holders, values, strict=True):
            for place in holder.mutable:
                copy_contents(of_holder[place], contents)
        if not strongly:
            values = [without_tensors(of_holder) for of_holder in values]
            contents = [(container, held(content)) for container, content in contents]
        buffers = [
            MISSING if (buffer := variables[name]) is not None and buffer.requires_grad else buffer
            for variables, name in self.buffers
        ]
        return State(
            self,
            values,
            contents,
            [variables["training"] for variables in self.modules],
            [variables["p"] for variables in self.dropouts],
            buffers,
            [0 if buffer is None or buffer is MISSING else version(buffer) for buffer in buffers],
            [
                sample_of(buffer) if sampled and buffer is not None and buffer is not MISSING else None
                for buffer, sampled in zip(buffers, self.sampled, strict=True)
            ],
            [generator_state(generator) for generator in self.generators],
            self.root.get("forward"),
        )
