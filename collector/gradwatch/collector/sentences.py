"""A verdict in words. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradwatch.collector.evidence import first_step
from gradwatch.collector.model import LikelyKind, UnknownReason
from gradwatch.collector.observations import Phase, UpdateEvidence, Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.model import Evidence, Guess, Own, Sighting, Update, Verdict
    from gradwatch.collector.observations import BadLoss, Exploding

# More ranks than this are counted, not listed.
_LISTED = 8

_VALUES = {
    Value.NAN: "NaN",
    Value.POSITIVE_INFINITY: "+Inf",
    Value.NEGATIVE_INFINITY: "-Inf",
}

_PHASES = {
    Phase.INPUT: "The batch that it was given was not finite: bad data.",
    Phase.PARAMETER: "Its weights were not finite before that step.",
    Phase.FORWARD: "Its batch and its weights were finite, and what its forward pass gave was not.",
    Phase.LOSS: "What its forward pass gave was finite, and the gradient of the loss was not.",
    Phase.BACKWARD: "The gradient of the loss was finite, and went bad on its way back through the model.",
    Phase.UPDATE: "Its weights were finite before the update, and not after it.",
}
_BACKWARD_WITH_LOSS = "It went bad in the backward pass, which here includes the loss function."
_ENTERED_FINITE = "What entered its part of the model and its weights were finite, "
_ENTERED = "What entered its part of the model was not finite: it may have come from another rank."

# Before the operator that made it is named.
_FINITE_BEFORE = {
    Phase.FORWARD: "Its batch and its weights were finite; ",
    Phase.LOSS: "What its forward pass gave was finite; ",
    Phase.BACKWARD: "The gradient of the loss was finite; ",
}

# Before any operator ran: an infinity, of which the one that is named made something worse.
_BAD_BEFORE = {
    Phase.INPUT: "The batch that it was given was not finite, which is bad data",
    Phase.PARAMETER: "Its weights were not finite before that step",
}

# Where an operator ran.
_PASSES: Mapping[Phase | None, str] = {
    Phase.BACKWARD: "the backward pass",
    Phase.LOSS: "the loss function",
}
# Phases of which the loss's value tells something.
_BEFORE_LOSS = (None, Phase.FORWARD, Phase.BACKWARD)

_LIKELY = {
    LikelyKind.BAD_DATA: "bad data",
    LikelyKind.DEVICE: "a device",
    LikelyKind.DOMAIN: "arithmetic at the edge of its domain",
    LikelyKind.SATURATION: "saturation",
    LikelyKind.PRECISION: "precision",
    LikelyKind.HYPERPARAMETERS: "hyperparameters",
    LikelyKind.EXPLODING_GRADIENTS: "exploding gradients",
    LikelyKind.INITIALISATION: "bad initialisation",
}

_WEIGHTS_OF_ALL = "All ranks were bad at once, since all have the same weights."
_WEIGHTS_OF_ONE = (
    "Only this rank's weights were bad: look at what changes weights there and on no other rank."
)
_ALL_AT_ONCE = (
    "All ranks were bad at once: look at what they share, such as the learning rate or the code, before any "
    "one rank's batch."
)
_ITS_BATCH = "The ranks share weights and code, and not the batch: look at its batch."
# The look of a process in which nothing is wrapped: where the model ends is not known.
_UNWRAPPED = "gradient"
# Doubts and steps that are told.
_TOLD_DOUBTS = 6

_EVIDENCE = {
    UpdateEvidence.GRADIENTS: "Gradients were finite after the reduction, and {gradients} not when the "
    "optimizer took {them}: code between the two had changed {them}.",
    UpdateEvidence.STATE: "Its gradients were finite, and the optimizer's state was not.",
    UpdateEvidence.EPSILON: "Elements have a second moment of 0, and the optimizer's eps{eps} is 0 in their "
    "dtype: it divides by 0.",
}

_UNKNOWN = {
    UnknownReason.WAITING: "its view of the round has not arrived yet",
    UnknownReason.PROCESS_ENDED: "its process ended before it had looked at the round",
    UnknownReason.LAUNCH_ENDED: "its launch ended before its view of the round arrived",
    UnknownReason.ATTEMPT_OVER: "its attempt was over before its view of the round arrived",
    UnknownReason.SILENT: "nothing was heard of it for the confirm timeout",
    UnknownReason.NEVER_SEEN: "no watched process of that rank was ever seen",
    UnknownReason.RECORDS_LOST: "something that it reported around that round was lost",
}


def explain(
    origins: Sequence[Sighting],
    tie: bool,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    contaminated: Sequence[int],
    *,
    received: Sequence[int] = (),
    guesses: Sequence[Guess] = (),
) -> tuple[str, ...]:
    """Say who was first, who was clean, and what is not known.

    Args:
        origins: in logical order.
        tie: whether several of them share the first position.
        clean: ranks that were clean in the first round.
        unknown: ranks of which that is not known, and why.
        contaminated: ranks that were first bad after an update.
        received: ranks that a collective of the forward pass had made bad.
        guesses: what is likely to be behind it.
    """
    sentences = [_first(origins, tie), *_what(origins[0])]
    spread = []
    if received:
        spread.append(
            f"{_ranks(received)} {_were(received)} bad in the same round, and got it from there: a "
            "collective of the forward pass had spread it before there were gradients"
        )
    first = origins[0]
    others = [origin for origin in origins[1:] if not (tie and _place(origin) == _place(first))]
    # Where models' steps are told, a later round is one that stands for itself.
    by_itself = sorted(
        (
            one
            for one in others
            if one.round > first.round and one.model_step is not None and one.weights_finite
        ),
        key=lambda one: one.rank,
    )
    together = [one.rank for one in others if one not in by_itself]
    if together:
        spread.append(
            f"{_ranks(together, lower=bool(spread))} {_were(together)} bad before any update was applied too"
        )
    if by_itself:
        ranks = [one.rank for one in by_itself]
        spread.append(
            f"{_ranks(ranks, lower=bool(spread))} {_were(ranks)} bad later, at "
            f"{_steps(sorted({one.step for one in by_itself}))}, and not by what was reduced: the weights "
            "were finite"
        )
    if clean:
        spread.append(f"{_ranks(clean, lower=bool(spread))} {_were(clean)} clean in that round")
        after = sorted(set(contaminated).intersection(clean))
        if after:
            spread.append(
                f"the all-reduce then spread it, and {_ranks(after, lower=True)} {_were(after)} bad after "
                "the update"
            )
    if spread:
        sentences.append(f"{'; '.join(spread)}.")
    sentences += _of_unknown(unknown)
    told = [guess for guess in guesses if guess.kind is not LikelyKind.UNKNOWN or guess.remedy]
    if told:
        sentences.append(_likely(told[0]))
    elif not unknown and not received:
        sentences += _where_to_look(origins, clean)
    return tuple(sentences)


def explain_reduction(
    evidence: Evidence,
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    later: Sequence[Sighting] = (),
) -> tuple[str, ...]:
    """Say that only what the reduction gave was bad.

    Args:
        evidence: the incident's.
        clean: ranks that were clean in its first round, in order.
        unknown: ranks of which that is not known, and why.
        later: bad gradients of the ranks' own, in later steps, that the reduced ones have not touched.
    """
    reduced = evidence.reduced
    what = "the gradients" if reduced is None or reduced.parameter is None else reduced.parameter
    when = f"at step {first_step(evidence)} (round {evidence.first_round})"
    ranks = sorted({seen.rank for seen in later})
    own = (
        [f"From step {later[0].step} on the own gradients of {_ranks(ranks, lower=True)} were bad too."]
        if later
        else []
    )
    if unknown:
        return (
            f"The reduced gradient of {what} was not finite {when}; who made it is not known.",
            f"The own gradients of {_ranks(clean, lower=True)} were finite."
            if clean
            else "No rank has said more.",
            *_of_unknown(unknown),
            *own,
        )
    return (
        f"Every rank's own gradients were finite {when}, and their reduction was not: {what} is the first.",
        *_how_reduced(None if reduced is None else reduced.value),
        *own,
    )


def explain_overflow(
    seen: Sighting,
    origins: Sequence[Sighting],
    step: int,
    unknown: Mapping[int, UnknownReason],
    *,
    alone: bool,
) -> tuple[str, ...]:
    """Say that a finite gradient was too large for the optimizer.

    Args:
        seen: the gradient that the optimizer got.
        origins: with the largest shares in it, the largest first.
        step: of the update.
        unknown: ranks that have not told their share.
        alone: there is one rank only.
    """
    overflow = seen.overflow
    if overflow is None:
        return ()
    first = (
        f"The gradient of {seen.parameter} came to {overflow.magnitude:.3g} at step {step} "
        f"(round {seen.round}): finite, and its square more than the second moment of {overflow.optimizer} "
        f"can hold (limit {overflow.limit:.3g})."
    )
    sentences = [first]
    if origins and not alone:
        sentences.append(_shares(origins))
    sentences.append(
        "The guard skipped the update, so the optimizer's state was not touched."
        if overflow.skipped
        else "With that state the parameter will never move again, without any NaN to show it: go back to a "
        "checkpoint from before that step."
    )
    sentences.append("Clip the gradients, and look at what that batch does to the loss.")
    return (*sentences, *_of_unknown(unknown))


def explain_replicas(origins: Sequence[Sighting], others: Sequence[int]) -> tuple[str, ...]:
    """Say whose parameters are not those of the others.

    Args:
        origins: the odd ones out; all ranks if it cannot be told whose are right.
        others: ranks that agree; their checksums are known, whatever else of them is not.
    """
    first = origins[0]
    ranks = [origin.rank for origin in origins]
    several = "one parameter" if first.gradients_total == 1 else "more than one parameter"
    what = several if first.parameter is None else first.parameter
    since = (
        "No earlier check is known of."
        if first.alike_at is None
        else f"At step {first.alike_at} all had still been alike."
    )
    if not others:
        differ = (
            f"{_ranks(ranks)} do not have the same parameters at step {first.step} (round {first.round}): "
            f"{what} differs, and it cannot be told whose is right."
        )
        return (differ, since, "Go back to a checkpoint from before that.")
    who = f"{_ranks(ranks)} on node {first.node}" if len(ranks) == 1 else _ranks(ranks)
    have = "has" if len(ranks) == 1 else "have"
    apart = (
        f"{who} {have} drifted apart: at step {first.step} (round {first.round}) {what} is not what it is on "
        f"{_ranks(sorted(others), lower=True)}."
    )
    remedy = (
        "Replicas get the same updates, so something changed it there alone: look for code that changes "
        "weights on one rank only, and go back to a checkpoint from before that."
    )
    return (apart, since, remedy)


def explain_weights(
    origins: Sequence[Sighting],
    clean: Sequence[int],
    unknown: Mapping[int, UnknownReason],
    contaminated: Sequence[int],
    guesses: Sequence[Guess] = (),
) -> tuple[str, ...]:
    """Say that weights were bad before anything else was.

    Args:
        origins: ranks whose weights were; those of a known update first.
        clean: ranks that were clean in that round.
        unknown: ranks of which that is not known, and why.
        contaminated: ranks that were bad after it.
        guesses: what is likely to be behind it.
    """
    first = origins[0]
    ranks = sorted(origin.rank for origin in origins)
    sentences = [*_of_update(first, _where(first, ranks, [*clean, *unknown]))]
    spread = []
    if clean:
        spread.append(f"{_ranks(clean)} {_were(clean)} clean in that round")
    after = sorted(contaminated)
    if after:
        spread.append(f"{_ranks(after, lower=bool(spread))} {_were(after)} bad after it")
    if spread:
        sentences.append(f"{'; '.join(spread)}.")
    sentences += _of_unknown(unknown)
    told = [guess for guess in guesses if guess.kind is not LikelyKind.UNKNOWN or guess.remedy]
    if told:
        sentences.append(_likely(told[0]))
    return tuple(sentences)


def tell_again(first: Sighting, again: Sequence[Own]) -> tuple[str, ...]:
    """Say in which later steps of the incident the first rank was bad by itself again."""
    steps = sorted({one.step for one in again if one.step != first.step})
    if not steps:
        return ()
    same = {one.batch_hash for one in again} == {first.batch_hash} and first.batch_hash
    entered = "the same input" if first.group or first.exchanged else "the same batch"
    return (f"Rank {first.rank} was bad again at {_steps(steps)}{f', with {entered}' if same else ''}.",)


def tell_before(verdict: Verdict) -> tuple[str, ...]:
    """Say in which steps the first rank had been first before, in earlier incidents."""
    first = verdict.first
    if first is None or not verdict.before:
        return ()
    return (f"Rank {first.rank} was first at {_steps(sorted(set(verdict.before)))}, too.",)


def tell_doubts(first: Sighting, doubts: Sequence[str]) -> tuple[str, ...]:
    """Say why nothing follows from a replay that stayed finite."""
    if not doubts:
        return ()
    more = f"; and {len(doubts) - _TOLD_DOUBTS} more" if len(doubts) > _TOLD_DOUBTS else ""
    listed = "; ".join(doubt.rstrip(".") for doubt in doubts[:_TOLD_DOUBTS])
    text = (
        f"Replayed on rank {first.rank} it stayed finite, and the replay is not shown to have repeated the "
        f"pass: {listed}{more}."
    )
    return (text,)


def warn_of_loss(rank: int, warning: BadLoss) -> str:
    """Say that a loss is not finite, and its gradients are."""
    return (
        f"Rank {rank}: the loss was {number(warning.loss)} at step {warning.step} with finite gradients; the "
        "update was not harmed."
    )


def warn_of_growth(rank: int, warning: Exploding) -> str:
    """Say that a gradient grows."""
    return (
        f"Rank {rank}: the gradient of {warning.parameter} has grown to {warning.magnitude:.3g} at step "
        f"{warning.step}, from {warning.usual:.3g} as usual; if it goes on, it will overflow."
    )


def _shares(origins: Sequence[Sighting]) -> str:
    """Who had how much in a gradient that is too large, the largest first."""
    own = [None if origin.overflow is None else origin.overflow.own for origin in origins]
    share = "" if own[0] is None else f", {own[0]:.3g} before the reduction"
    most = [origin.rank for origin, one in zip(origins, own, strict=True) if one == own[0]]
    rest = [origin.rank for origin in origins if origin.rank not in most]
    whose = f"{_ranks(most)} on node {origins[0].node}" if len(most) == 1 else _ranks(most)
    near = f"; more than half as much came from {_ranks(sorted(rest), lower=True)}" if rest else ""
    return f"{whose} had the largest share in it{share}{near}."


def _what(first: Sighting) -> tuple[str, ...]:
    """What kind of fault it was, and which operator made it."""
    operator = first.operator
    if operator is None or operator.name is None:
        return (*_of_phase(first), *_of_loss(first))
    where = f" in {operator.module}" if operator.module else ""
    line = "" if operator.source is None else f", called from {operator.source}"
    code = "" if operator.code is None else f" ({operator.code:.80})"
    ranges = [
        f"{one.min:.3g}" if one.min == one.max else f"{one.min:.3g} to {one.max:.3g}"
        for one in operator.inputs
        if one.min is not None and one.max is not None and not one.is_number
    ]
    inputs = f" It was given {_listed(ranges)}." if ranges else ""
    which = _PASSES.get(operator.phase, "the forward pass")
    if operator.phase is Phase.BACKWARD and _is_unwrapped(first):
        which = "the backward pass, which here includes the loss function"
    bad = None if first.phase is None else _BAD_BEFORE.get(first.phase)
    if bad is not None:
        if first.phase is Phase.INPUT and _is_part(first):
            bad = _ENTERED.rstrip(".")
        return (
            f"{bad}, and spread by {operator.name}{where} in {which}{line}{code}.",
            *(_since(first) if first.phase is Phase.PARAMETER else ()),
        )
    before = "" if first.phase is None or _is_unwrapped(first) else _FINITE_BEFORE[first.phase]
    if first.phase is Phase.FORWARD and _is_part(first):
        before = f"{_ENTERED_FINITE[:-2]}; "
    return (
        f"{before}{operator.name}{where} made it in {which}{line}{code}.{inputs}",
        *_of_loss(first),
    )


def _of_phase(first: Sighting) -> tuple[str, ...]:
    """What kind of fault it was."""
    if first.phase is None:
        return ()
    if first.phase is Phase.BACKWARD and _is_unwrapped(first):
        return (_BACKWARD_WITH_LOSS,)
    if first.phase is Phase.INPUT and _is_part(first):
        return (_ENTERED,)
    if first.phase is Phase.LOSS and first.loss is not None:
        # What is said of the loss says it.
        return ()
    if first.phase is Phase.FORWARD and _is_part(first):
        return (f"{_ENTERED_FINITE}and what its forward pass gave was not.",)
    return (_PHASES[first.phase], *(_since(first) if first.phase is Phase.PARAMETER else ()))


def _of_loss(first: Sighting) -> tuple[str, ...]:
    """What is known of the loss, where it tells something."""
    told = []
    loss = "" if first.loss is None else number(first.loss)
    if first.loss is not None and first.phase is Phase.LOSS:
        told.append(
            f"The loss was finite and its gradient was not: the loss was {loss}."
            if math.isfinite(first.loss)
            else f"The loss was {loss} on rank {first.rank} while the model's output was finite."
        )
    elif first.loss is not None and first.phase in _BEFORE_LOSS and not math.isfinite(first.loss):
        told.append(f"The loss was {loss} on rank {first.rank}.")
    if first.loss_note and first.phase not in _BAD_BEFORE:
        told.append(f"{first.loss_note.rstrip('.')}.")
    return tuple(told)


def _since(first: Sighting) -> tuple[str, ...]:
    if first.update is not None and first.update.initial:
        return ("They were so when the model was wrapped, before any update.",)
    if first.finite_step is None:
        return ()
    return (f"They were last known finite at step {first.finite_step}.",)


def _of_update(first: Sighting, where: str) -> tuple[str, ...]:
    """What made weights bad, as far as it is known."""
    update = first.update
    what = f"the weight {first.parameter}" if first.bad_weights else "weights"
    model = _model(first)
    value = _value(first.value)
    more = first.bad_weights_total - 1
    others = f", and {more} more" if first.bad_weights and more > 0 else ""
    if update is None or update.evidence is None:
        found = (
            f"{what[:1].upper()}{what[1:]}{model} was {value}{where} before the update of step {first.step}"
        )
        if not first.bad_weights:
            found = f"Weights{model} were not finite{where} before the update of step {first.step}"
        return (f"{found} (round {first.round}){others}.", *_since(first))
    said = f"The update of step {first.step} (round {first.round}){_by(update)}"
    if first.bad_weights:
        made = f"{said} made {what}{model} {value}{where}{others}."
    else:
        made = (
            f"{said} made weights{model} not finite{where}: "
            f"the gradient of {first.parameter} was {value} when the optimizer took it."
        )
    total = update.gradients_total
    first_one = f" ({update.gradient} is the first)" if update.gradient and total > 1 else ""
    words = _EVIDENCE[update.evidence].format(
        gradients=f"that of {update.gradient} was"
        if total == 1 and update.gradient
        else f"{total or 'some'} of them{first_one} were",
        them="it" if total == 1 and update.gradient else "them",
        eps="" if update.eps is None else f" of {update.eps:.3g}",
    )
    return (made, words)


def _by(update: Update) -> str:
    """The optimizer, with what it was set to."""
    known = []
    if update.eps is not None:
        known.append(f"eps {update.eps:.3g}")
    if update.learning_rate is not None:
        known.append(f"learning rate {update.learning_rate:.3g}")
    settings = f" ({', '.join(known)})" if known else ""
    return f" by {update.optimizer or 'the optimizer'}{settings}"


def _where(first: Sighting, ranks: Sequence[int], others: Sequence[int]) -> str:
    """On which ranks."""
    if not others and len(ranks) > 1:
        return " on all ranks"
    if len(ranks) == 1:
        return f" on rank {first.rank} (node {first.node})"
    return f" on {_ranks(ranks, lower=True)}"


def _model(first: Sighting) -> str:
    """Which of several models."""
    return "" if first.model is None else f" in model {first.model.ordinal} ({first.model.module_class})"


def _is_unwrapped(first: Sighting) -> bool:
    return first.look == _UNWRAPPED and first.phase is Phase.BACKWARD


def _is_part(first: Sighting) -> bool:
    """Whether what enters it may come from another rank."""
    return bool(first.group) or first.exchanged


def _how_reduced(value: Value | None) -> tuple[str, ...]:
    """How a sum of finite gradients came to be bad."""
    if value in {Value.POSITIVE_INFINITY, Value.NEGATIVE_INFINITY}:
        return (
            "So no rank made it: their sum was more than the dtype can hold.",
            "Reduce in fp32, or with smaller values.",
        )
    came = "not finite" if value is None else _VALUES[value]
    return (
        f"So no rank's own gradients made it, and how their sum came to be {came} is not known.",
        "Look at what works on gradients while they are reduced, such as a communication hook.",
    )


def number(value: float) -> str:
    """A number as sentences have it."""
    if math.isnan(value):
        return "NaN"
    return f"{value:.3g}"


def _value(value: Value | None) -> str:
    return "not finite" if value is None else _VALUES[value]


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {_listed([str(step) for step in steps])}"


def _likely(guess: Guess) -> str:
    if guess.kind is LikelyKind.UNKNOWN:
        return f"{guess.because[:1].upper()}{guess.because[1:]}. {guess.remedy}"
    return f"Likely {_LIKELY[guess.kind]}: {guess.because}. {guess.remedy}"


def _of_unknown(unknown: Mapping[int, UnknownReason]) -> list[str]:
    by_reason: dict[UnknownReason, list[int]] = {}
    for rank, reason in sorted(unknown.items()):
        by_reason.setdefault(reason, []).append(rank)
    sentences = []
    for reason, ranks in by_reason.items():
        verb = "is unknown:" if len(ranks) == 1 else "are unknown; of each,"
        sentences.append(f"{_ranks(ranks)} {verb} {_UNKNOWN[reason]}.")
    return sentences


def _where_to_look(origins: Sequence[Sighting], clean: Sequence[int]) -> tuple[str, ...]:
    """What follows from how many ranks were bad, in the phase of the first."""
    phase, alone = origins[0].phase, len(origins) == 1 and bool(clean)
    all_ = len(origins) > 1 and not clean and all(one.round == origins[0].round for one in origins)
    if phase is None or not (alone or all_):
        return ()
    if phase is Phase.PARAMETER:
        return (_WEIGHTS_OF_ALL if all_ else _WEIGHTS_OF_ONE,)
    if all_:
        return (_ALL_AT_ONCE,)
    # Bad data says itself where to look; and what another rank sent is no batch.
    return () if phase is Phase.INPUT or _is_part(origins[0]) else (_ITS_BATCH,)


def tell_skips(evidence: Evidence) -> tuple[str, ...]:
    """Say which updates the guard skipped, as far as it is known; nothing when of none it is."""
    skips = evidence.skips
    if skips is None:
        return ()
    several = skips.first_step < skips.last_step
    which = f"updates of steps {skips.first_step} to {skips.last_step}" if several else "update"
    if skips.first_step > first_step(evidence):
        which = which if several else f"update of step {skips.last_step}"
        return (f"The guard skipped the {which}; of those before it that is not known.",)
    if skips.last_step < evidence.last_step:
        which = which if several else f"update of step {skips.last_step}"
        return (f"The guard skipped the {which}; of those after it that is not known yet.",)
    return (f"The guard skipped the {which}, so no weight was touched.",)


def _first(origins: Sequence[Sighting], tie: bool) -> str:
    first = origins[0]
    who = f"Rank {first.rank} on node {first.node}"
    micro = f", micro-batch {first.microbatch}" if first.microbatch else ""
    when = f"at step {first.step} (round {first.round}{micro})"
    if tie:
        shared = [origin.rank for origin in origins if _place(origin) == _place(first)]
        who += f" is named first, but {_ranks(shared, lower=True)} share that position"
    else:
        who += " was first"
    if first.group:
        who += f" within its group ({_ranks(first.group, lower=True)})"
    elif first.exchanged:
        who += " among what is known (tensors were exchanged between ranks)"
    if first.phase is Phase.PARAMETER and first.bad_weights:
        more = first.bad_weights_total - 1
        others = f", and {more} more weights were bad" if more > 0 else ""
        return f"{who}: the weight {first.parameter}{_model(first)} was {_value(first.value)} {when}{others}."
    if first.parameter is None:
        return f"{who}: its local gradients were not finite {when}."
    value = "turned non-finite" if first.value is None else f"turned {_VALUES[first.value]}"
    order = (
        ""
        if first.backward_position is None
        else f", the {_ordinal(first.backward_position + 1)} gradient to arrive in that backward pass"
    )
    return f"{who}: the gradient of {first.parameter}{_model(first)} {value} {when}{order}."


def _place(sighting: Sighting) -> tuple[object, ...]:
    return (sighting.round, sighting.microbatch, sighting.phase, sighting.backward_position)


def _ranks(ranks: Sequence[int], *, lower: bool = False) -> str:
    if len(ranks) > _LISTED:
        return f"{len(ranks)} ranks"
    word = "Rank" if len(ranks) == 1 else "Ranks"
    listed = ", ".join(map(str, ranks[:-1])) + " and " if len(ranks) > 1 else ""
    return f"{word.lower() if lower else word} {listed}{ranks[-1]}"


def _were(ranks: Sequence[int]) -> str:
    return "was" if len(ranks) == 1 else "were"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _ordinal(number: int) -> str:
    if number % 100 in {11, 12, 13}:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"
