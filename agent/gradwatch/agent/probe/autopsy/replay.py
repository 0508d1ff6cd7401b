"""Replay a forward and a backward pass, and say where they go bad.

The loss function is not needed: the gradient that came back to the output of the model stands for it.
"""

from __future__ import annotations

import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.autopsy.capsule import (
    NUMPY,
    PYTHON,
    RandomState,
    numpy_state,
    settings_now,
)
from gradwatch.agent.probe.autopsy.dissection import Collective, Dissection, Facts
from gradwatch.agent.probe.autopsy.evidence import (
    Evidence,
    Verdict,
    compare_gradients,
    compare_graphs,
    compare_outputs,
)
from gradwatch.agent.probe.autopsy.frames import code_of, named
from gradwatch.agent.probe.autopsy.graph import digest_of, inner
from gradwatch.agent.probe.autopsy.place import Places
from gradwatch.agent.probe.autopsy.provenance import Event, Given, origin_of
from gradwatch.agent.probe.autopsy.values import kinds_of
from gradwatch.agent.probe.parameters import clean_path
from gradwatch.agent.probe.passes import Leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradwatch.agent.probe.autopsy.capsule import Capsule
    from gradwatch.agent.probe.autopsy.dissection import Care
    from gradwatch.agent.probe.autopsy.provenance import Source

_GIVEN = {
    "parameter": "no operator is named: a parameter of the model is not finite",
    "input": "no operator is named: the input is not finite",
    "gradient": "no operator is named: the gradient that came back to the model is not finite",
    "constant": "no operator is named: a buffer, or a tensor from outside of the model, is not finite",
}
_PHASE_OF_GIVEN = {"parameter": "PHASE_PARAMETER", "input": "PHASE_INPUT"}
_HOST = torch.device("cpu")
LOSS = (
    "the gradient that came back to the output is not finite: the loss made it, outside of the model, and "
    "only the model can be replayed"
)


@dataclass(frozen=True)
class Case:
    """What is to be replayed.

    Attributes:
        module: the user's model.
        capsule: what went in.
        parameters: gives, where it is replayed, those in the order in which their gradients arrived; in a
            child it may change the module.
        output_was_bad: whether the model's output was, when it ran; None when not known.
        evidence: to compare the replay with; None where it is not to be judged.
        ordinals: of the parameters, in the same order on every rank.
    """

    module: torch.nn.Module
    capsule: Capsule
    parameters: Callable[[], Sequence[torch.Tensor]]
    output_was_bad: bool | None
    evidence: Evidence | None = None
    ordinals: Sequence[int] = ()


def replay(case: Case, care: Care | None = None, doubts: list[str] | None = None) -> dict[str, Any]:
    """Replay it.

    Args:
        case: what is to be replayed.
        care: what is to be minded; None in a child process that ends afterwards.
        doubts: of `put_in_place`, where that has been done.

    Returns:
        Fields of the `Autopsy` message in its JSON mapping.
    """
    capsule, parameters = case.capsule, case.parameters()
    verdict = Verdict(
        put_in_place(capsule) if doubts is None else doubts,
        hidden=[] if capsule.state is None else capsule.state.hidden(),
    )
    places = Places(case.module, replay.__code__)
    inputs = Leaves((capsule.args, capsule.kwargs)).tensors
    dissection = Dissection(
        [
            ("gradient", list(capsule.entering.values())),
            ("input", inputs),
            ("parameter", list(case.module.parameters())),
        ],
        places.here,
        care,
    )
    try:
        with places:
            bad = _passes(case, parameters, dissection, verdict)
    except _NotDone as why:
        return not_done(str(why))
    except Exception as error:
        if dissection.refused is not None:
            return not_done(str(dissection.refused))
        collective = dissection.collective
        if collective is None:
            return not_done(f"the replay failed with {type(error).__name__}: {_first_line(error)}")
        return _ended_at(collective, dissection, case)
    if bad is not None:
        return _told(bad, case.module)
    finite = {"replay": "REPLAY_FINITE"}
    return finite if case.evidence is None else finite | verdict.as_fields()


def put_in_place(capsule: Capsule) -> list[str]:
    """Have Python's state be that of the start of the pass; phrases of what is not known of it."""
    state = capsule.state
    doubts = list(capsule.doubts)
    if capsule.settings != settings_now():
        doubts.append("torch was set up otherwise: its default dtype, precision or smallest numbers")
    if state is None:
        return doubts or ["the state of its modules was not kept"]
    doubts += state.doubts()
    state.restore()
    return doubts


class _NotDone(Exception):  # noqa: N818 - an outcome
    """It cannot be replayed, for this reason."""


def _passes(
    case: Case, parameters: Sequence[torch.Tensor], dissection: Dissection, verdict: Verdict
) -> Source | None:
    """Go through both passes; where the first bad result was made, if there is one."""
    capsule, evidence = case.capsule, case.evidence or Evidence()
    arguments = _detached(capsule.args), _detached(capsule.kwargs)
    verdict.doubts += evidence.doubts
    if capsule.rng is not None:
        capsule.rng.restore(capsule.device)
    python, numpy = random.getstate(), numpy_state()
    enabled, dtype = capsule.autocast
    with torch.enable_grad(), _eager(), dissection:
        with torch.autocast(capsule.device.type, dtype=dtype, enabled=enabled):
            output = case.module(*arguments[0], **arguments[1])
        leaves = Leaves(output).tensors
        if not leaves:
            raise _NotDone("the model's output holds no tensor")
        masked = False
        for leaf in leaves:
            bad = dissection.bad(leaf.detach())
            if bad is not None and not bad.masked:
                return bad
            masked = masked or bad is not None
    if capsule.rng is not None and capsule.rng.numpy is None and numpy != numpy_state():
        verdict.doubts.append(NUMPY)
    if capsule.rng is not None and capsule.rng.python is None and python != random.getstate():
        verdict.doubts.append(PYTHON)
    if case.evidence is not None:
        entered = [leaves[place] for place in evidence.ordinals if place < len(leaves)]
        edges = [(leaf.grad_fn, leaf.output_nr) for leaf in entered]
        compare_outputs(evidence, leaves, verdict)
        compare_graphs(evidence, digest_of(edges, Leaves(arguments).tensors), verdict)
    fed = _fed(leaves, capsule)
    with torch.enable_grad(), _eager(), dissection:
        if any(kinds_of(capsule.entering[place]).any for place in fed):
            if case.output_was_bad and not masked:
                return None
            raise _NotDone(LOSS)
        return _backward(case, parameters, dissection, [(leaves[place], place) for place in fed], verdict)


def _eager() -> Any:
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _fed(leaves: Sequence[torch.Tensor], capsule: Capsule) -> list[int]:
    """By which parts of the output gradients are fed: what comes to the others comes by these."""
    known = [place for place, leaf in enumerate(leaves) if place in capsule.entering and leaf.requires_grad]
    made_of = inner([leaves[place].grad_fn for place in known])
    return [place for place in known if id(leaves[place].grad_fn) not in made_of]


def _backward(
    case: Case,
    parameters: Sequence[torch.Tensor],
    dissection: Dissection,
    outputs: Sequence[tuple[torch.Tensor, int]],
    verdict: Verdict,
) -> Source | None:
    trained = [place for place, parameter in enumerate(parameters) if parameter.requires_grad]
    if not outputs:
        raise _NotDone("no gradient came back to the model's output")
    dissection.backward = True
    drawn = RandomState.now(_HOST, python=True, numpy=True)
    results: Any = torch.autograd.grad(
        [leaf for leaf, _ in outputs],
        [parameters[place] for place in trained],
        [case.capsule.entering[place] for _, place in outputs],
        allow_unused=True,
    )
    for gradient in results:
        if gradient is not None and (bad := dissection.bad(gradient)) is not None:
            return bad
    if case.evidence is not None:
        if not drawn.equals(RandomState.now(_HOST, python=True, numpy=True)):
            verdict.doubts.append("its backward pass draws random numbers")
        gradients = {case.ordinals[place]: one for place, one in zip(trained, results, strict=True)}
        compare_gradients(case.evidence, gradients, verdict)
    return None


def _ended_at(collective: Collective, dissection: Dissection, case: Case) -> dict[str, Any]:
    """A collective was about to be issued."""
    if collective.bad is not None and not collective.bad.masked:
        told = _told(collective.bad, case.module)
        told.setdefault("missing", []).append(
            f"what comes after {collective.operator}: a collective is not issued in a replay"
        )
        return told
    if dissection.backward:
        return not_done(
            f"the backward pass calls a collective ({collective.operator}), all being finite until then"
        )
    if case.output_was_bad:
        return {
            "replay": "REPLAY_RECEIVED",
            "missing": [f"all was finite until {collective.operator}, which brings what other ranks give"],
        }
    return not_done(
        f"the forward pass calls a collective ({collective.operator}), all being finite until then"
    )


def _told(bad: Source, module: torch.nn.Module) -> dict[str, Any]:
    """It went bad again, and this is where."""
    origin = origin_of(bad)
    told: dict[str, Any] = {"replay": "REPLAY_REPRODUCED", "value": origin.kinds.value}
    if isinstance(origin, Given):
        phase = _PHASE_OF_GIVEN.get(origin.what)
        buffer = _bad_buffer(module) if origin.what == "constant" else None
        if buffer is not None:
            return told | {"missing": [f"no operator is named: buffer {buffer} of the model is not finite"]}
        return told | ({} if phase is None else {"phase": phase}) | {"missing": [_GIVEN[origin.what]]}
    return told | _of_operator(origin)


def _of_operator(event: Event) -> dict[str, Any]:
    facts: Facts = event.facts
    place, missing = facts.place, []
    told: dict[str, Any] = {
        "phase": _phase_of(event),
        "operator": facts.operator,
        "inputs": facts.inputs,
    }
    if place.module is None:
        missing.append("the module is not known: the operator ran outside of the forward of any")
    else:
        told |= {"module": place.module, "module_class": place.module_class}
    if place.line is None:
        missing.append("the line is not known: no Python code called the operator, or it was not kept")
    else:
        told |= {"source": named(place.line), "code": code_of(place.line)}
    return told | {"missing": missing}


def _bad_buffer(module: torch.nn.Module) -> str | None:
    """The name of the first buffer that holds what no mask does."""
    named_buffers = ((clean_path(name), kinds_of(buffer)) for name, buffer in module.named_buffers())
    return next((name for name, kinds in named_buffers if kinds.nan or kinds.positive), None)


def _phase_of(event: Event) -> str:
    """Where it began. Infinities of the input may be a mask, but not those that an operator makes worse."""
    if any(isinstance(source, Given) and source.what == "input" for source in event.bad):
        return "PHASE_INPUT"
    return "PHASE_BACKWARD" if event.facts.backward else "PHASE_FORWARD"


def not_done(reason: str) -> dict[str, Any]:
    """Fields of the `Autopsy` message of a pass that could not be replayed."""
    return {"replay": "REPLAY_NOT_DONE", "reason": reason}


def _detached(value: Any) -> Any:
    """The same, with tensors that belong to no graph; what is no plain container stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if type(value) in {list, tuple}:
        return type(value)(_detached(one) for one in value)
    if type(value) is dict:
        return {key: _detached(one) for key, one in value.items()}
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]
