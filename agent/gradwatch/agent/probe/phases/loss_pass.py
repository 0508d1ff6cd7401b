"""One backward pass, seen from the loss in which it begins.

The loss is the script's own, outside of any model, and no replay repeats it. What can be said of it is read
off its autograd graph: which operators there are, and by which ways it reaches the weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe.phases import loss_graph

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from gradwatch.agent.probe.losses import Number
    from gradwatch.agent.probe.passes import Origin, Pass

# Of finite numbers these give finite ones, and at some of them a derivative that is not: a root at 0, a
# distance of 0, an angle of 0, singular values that are alike. (torch defines that of a norm at 0 to be 0.)
_STEEP = frozenset(
    {"sqrt", "pow", "acos", "asin", "acosh", "hypot", "atan2", "angle", "polar"}
    | {"linalg_eigh", "linalg_eig", "linalg_svd", "linalg_qr", "linalg_cholesky_ex", "renorm"}
)
# These give what is not finite at the edge of their domain, which an operator that selects may hide.
_GUARDED = frozenset(
    {"log", "log2", "log10", "log1p", "div", "reciprocal", "rsqrt", "exp", "expm1", "exp2"}
    | {"atanh", "logit", "xlogy", "tan", "erfinv", "var", "std", "softmax", "log_softmax"}
)
_SELECT = frozenset(
    {"where", "masked_fill", "masked_select", "index", "masked_scatter", "nan_to_num", "minimum", "maximum"}
)
# A power below it has an infinite derivative at 0.
_STEEP_BELOW = 1.0
_NAMED = 4
_COMPILED = "CompiledFunction"


@dataclass(frozen=True)
class GraphFacts:
    """What the graph of a loss shows.

    Attributes:
        outside: the `id`s of the leaves that it reaches without going through a model's output.
        suspects: operators between the loss and the models whose derivative may be infinite where they
            themselves are finite, each once.
        outer: by the `id` of an entrance, which would keep the graph, as `loss_graph.from_outside` tells.
        is_compiled: some of it runs in compiled regions.
    """

    outside: frozenset[int]
    suspects: tuple[str, ...]
    outer: dict[int, bool | None]
    is_compiled: bool = False


@dataclass(eq=False)
class LossPass:
    """A backward pass that is under way, or is over.

    Attributes:
        roots: nodes where it began; none once it is over.
        loss: before it was scaled, as in `Losses`.
        passes: of watched models, that it has entered; none once it is over.
        knows_all: `passes` are all that it has entered.
        is_bad: a gradient that entered a model was, or one that left it: the graph is looked at.
        made: of a loss that is not finite, fields of the `Autopsy` message in its JSON mapping.
        facts: of its graph; None as long as nobody has asked, and where it cannot be walked.
    """

    roots: tuple[Any, ...] = ()
    loss: Number = None
    passes: list[Pass] = field(default_factory=list)
    knows_all: bool = True
    is_bad: bool = False
    made: dict[str, Any] | None = None
    facts: GraphFacts | None = None

    def entered(self, one: Pass) -> None:
        """Gradients have come to an output of a model."""
        if all(one is not other for other in self.passes):
            self.passes.append(one)

    def look(self) -> GraphFacts | None:
        """What its graph shows by now; None when that is not known."""
        if not self.roots:
            return self.facts
        entrances = {entrance.node for one in self.passes for entrance in one.entrances}
        if None in entrances or not self.knows_all:
            return None
        # Passes of one model share their masks. To a model, the loss is all that comes after it.
        by_model: dict[int, list[Any]] = {}
        for one in self.passes:
            by_model.setdefault(id(one.masks), []).extend(entrance.node for entrance in one.entrances)
        try:
            outer: dict[int, bool | None] = {}
            for nodes in by_model.values():
                found = loss_graph.from_outside(self.roots, nodes)
                outer |= {id(node): whence for node, whence in found.items()}
            operators, leaves = loss_graph.around(self.roots, entrances)
            self.facts = GraphFacts(
                frozenset(id(leaf.variable) for leaf in leaves),
                _suspects(operators),
                outer,
                any(_COMPILED in node.name() for node in loss_graph.walk(self.roots)),
            )
        except loss_graph.TooLargeError:
            self.facts = None
        return self.facts

    def over(self) -> None:
        """The backward pass is over: nothing of the graph is kept."""
        try:
            if self.is_bad:
                self.look()
        finally:
            self.roots = ()
            self.passes = []


def settled(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes with `entering` as it is by their true entrances.

    The gradient at an output that the model itself made another output of was made in the model.
    """
    return tuple(_settled(one) for one in passes)


def _settled(one: Pass) -> Pass:
    loss = one.loss
    if loss is None or one.entering is not False or not one.entrances:
        return one
    facts = loss.look() if loss.roots else loss.facts
    if facts is None:
        return one
    bad = [facts.outer.get(id(entrance.node)) for entrance in one.entrances if entrance.gradient is False]
    if True in bad:
        return one
    # Bad only where gradients come from within, or from within as well.
    return dataclasses.replace(one, entering=None if None in bad else True)


def refine(origin: Origin, bad: Collection[int], passes: Iterable[Pass]) -> tuple[Origin, str]:
    """The origin with what the graph of the loss shows, and a sentence about that; "" for none.

    Args:
        origin: by what entered and left the model.
        bad: `id`s of the parameters whose gradients are bad.
        passes: of the model, in which these arose.
    """
    facts = next((facts for one in passes if one.loss is not None and (facts := one.loss.look())), None)
    if facts is None or not facts.outer or origin.phase not in {"PHASE_BACKWARD", None}:
        return origin, ""
    around = facts.outside.intersection(bad)
    if not around:
        return origin, ""
    # It may have come either way; a replay of the model goes one of them.
    origin = dataclasses.replace(origin, phase=None)
    by = f" (by {', '.join(facts.suspects[:_NAMED])})" if facts.suspects else ""
    only = (
        "whose gradients are bad" if len(around) == len(set(bad)) else "among those whose gradients are bad"
    )
    return origin, (
        f"A part of the loss uses weights outside of the model's forward pass{by}, {only}: a penalty, or a "
        "gradient of a gradient."
    )


def completed(
    report: dict[str, Any], phase: str | None, passes: Iterable[Pass], *, alone: bool = False
) -> dict[str, Any]:
    """Fields of an `Autopsy` that named no operator, with the one that the loss shows.

    Args:
        report: its fields in their JSON mapping.
        phase: of the finding; None when not known.
        passes: of the model, in which it arose.
        alone: no model is wrapped, so that the graph is that of the model and of its loss.
    """
    if report.get("operator") is not None or report["replay"] in {"REPLAY_REPRODUCED", "REPLAY_RECEIVED"}:
        return report
    losses = [one.loss for one in passes if one.loss is not None]
    loss = next((one for one in losses if one.is_bad or one.made is not None), next(iter(losses), None))
    if loss is None:
        return report
    missing = list(report.get("missing", ()))
    facts = loss.look()
    around = facts is not None and bool(facts.outside)
    outside = phase is None and around and report["replay"] == "REPLAY_FINITE"
    if loss.made is not None and (phase == "PHASE_LOSS" or outside or (alone and phase is None)):
        # What trains alone has its model in that graph.
        whole = alone and not (facts is not None and facts.outer)
        made = {**loss.made, "phase": "PHASE_FORWARD"} if whole else loss.made
        return {**report, **made, "missing": [*missing, *made.get("missing", ())]}
    if facts is None or not (phase == "PHASE_LOSS" or outside or (alone and phase == "PHASE_BACKWARD")):
        return report
    if len(facts.suspects) != 1:
        if outside:
            report = {**report, "phase": "PHASE_LOSS"}
        if facts.suspects:
            named = ", ".join(facts.suspects[:_NAMED])
            missing.append(f"no operator is named: in the loss it may be one of {named}")
        return {**report, "missing": missing}
    (suspect,) = facts.suspects
    missing.append(
        f"it was not seen but inferred: of the operators of the loss only {suspect} can be finite with a "
        "derivative that is not; its line is not known"
    )
    began = "PHASE_BACKWARD" if alone else "PHASE_LOSS"
    return {**report, "phase": began, "operator": suspect, "missing": missing}


def _suspects(nodes: Iterable[Any]) -> tuple[str, ...]:
    steep: dict[str, None] = {}
    guarded: dict[str, None] = {}
    selects = False
    for node in nodes:
        name = loss_graph.operator_of(node)
        if loss_graph.is_python(node):
            steep[name] = None
        elif name in _STEEP and not (name == "pow" and _is_flat(node)):
            steep[f"aten.{name}"] = None
        elif name in _GUARDED:
            guarded[f"aten.{name}"] = None
        selects = selects or name in _SELECT
    return tuple({**steep, **(guarded if selects else {})})


def _is_flat(node: Any) -> bool:
    """Whether a power has a finite derivative at 0. Plain numbers that a node has saved are not freed."""
    exponent = getattr(node, "_saved_exponent", None)
    return isinstance(exponent, (int, float)) and (exponent >= _STEEP_BELOW or exponent == 0)
