"""Verdicts on what no rank's own gradients show, in words: sums, optimizers, replicas and weights. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwatch.collector.evidence import first_step
from gradwatch.collector.model import Kind, LikelyKind
from gradwatch.collector.observations import UpdateEvidence, Value
from gradwatch.collector.overflow import HALF, LARGEST
from gradwatch.collector.words import (
    VALUES,
    likely_cause,
    more_weights,
    named,
    number,
    of_unknown,
    since_when,
    value_word,
    were,
    which_model,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradwatch.collector.model import Evidence, Guess, Sighting, UnknownReason, Update

_EVIDENCE = {
    UpdateEvidence.GRADIENTS: "Gradients were finite after the reduction, and {gradients} not when the "
    "optimizer took {them}: code between the two had changed {them}.",
    UpdateEvidence.STATE: "Its gradients were finite, and the optimizer's state was not.",
    UpdateEvidence.EPSILON: "Elements have a second moment of 0, and the optimizer's eps{eps} is 0 in their "
    "dtype: it divides by 0.",
    UpdateEvidence.SEEN: "Weights and gradients were finite right before the update, and the weights were "
    "not right after it: look at what the optimizer computes.",
    UpdateEvidence.LEARNING_RATE: "The learning rate was {rate}: look at the schedule that gave it.",
}

_INFINITIES = {Value.POSITIVE_INFINITY, Value.NEGATIVE_INFINITY}
_REDUCE_WIDER = "Reduce in fp32, or with smaller values."
_HOOKS = "Look at what works on gradients while they are reduced, such as a communication hook."
# Of an update that was given bad gradients: whether the weights are bad since.
_AFTER = {
    True: "Afterwards the weights were not finite.",
    False: "The weights stayed finite.",
    None: "Whether the weights are bad since is not known.",
}


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
    parameter = None if reduced is None else reduced.parameter
    when = f"at step {first_step(evidence)} (round {evidence.first_round})"
    ranks = sorted({seen.rank for seen in later})
    own = (
        [f"From step {later[0].step} on the own gradients of {named(ranks, lower=True)} were bad too."]
        if later
        else []
    )
    if unknown:
        return (
            f"The reduced gradients were not finite {when}; who made them so is not known."
            if parameter is None
            else f"The reduced gradient of {parameter} was not finite {when}; who made it is not known.",
            f"The own gradients of {named(clean, lower=True)} were finite."
            if clean
            else "No rank has said more.",
            *of_unknown(unknown),
            *own,
        )
    which = "" if parameter is None else f": {parameter} is the first"
    return (
        f"Every rank's own gradients were finite {when}, and their reduction was not{which}.",
        *_how_reduced(reduced),
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
    return (*sentences, *of_unknown(unknown))


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
            f"{named(ranks)} do not have the same parameters at step {first.step} (round {first.round}): "
            f"{what} differs, and it cannot be told whose is right."
        )
        return (differ, since, "Go back to a checkpoint from before that.")
    who = f"{named(ranks)} on node {first.node}" if len(ranks) == 1 else named(ranks)
    have = "has" if len(ranks) == 1 else "have"
    apart = (
        f"{who} {have} drifted apart: at step {first.step} (round {first.round}) {what} is not what it is on "
        f"{named(sorted(others), lower=True)}."
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
    *,
    made_bad: bool | None = True,
) -> tuple[str, ...]:
    """Say that weights were bad before anything else was.

    Args:
        origins: ranks whose weights were; those of a known update first.
        clean: ranks that were clean in that round.
        unknown: ranks of which that is not known, and why.
        contaminated: ranks that were bad after it.
        guesses: what is likely to be behind it.
        made_bad: whether the weights are bad since; None when that is not known.
    """
    first = origins[0]
    ranks = sorted(origin.rank for origin in origins)
    where = _where(first, ranks, [*clean, *unknown])
    if first.kind is Kind.UPDATE and not first.bad_weights:
        sentences = [*_of_given(first, where), _AFTER[made_bad]]
    else:
        sentences = [*_of_weights(first, where)]
    spread = []
    if clean:
        spread.append(f"{named(clean)} {were(clean)} clean in that round")
    after = sorted(contaminated)
    if after:
        spread.append(f"{named(after, lower=bool(spread))} {were(after)} bad after it")
    if spread:
        sentences.append(f"{'; '.join(spread)}.")
    sentences += of_unknown(unknown)
    told = [guess for guess in guesses if guess.kind is not LikelyKind.UNKNOWN or guess.remedy]
    if told:
        sentences.append(likely_cause(told[0]))
    return tuple(sentences)


def _shares(origins: Sequence[Sighting]) -> str:
    """Who had how much in a gradient that is too large, the largest first."""
    own = [None if origin.overflow is None else origin.overflow.own for origin in origins]
    share = "" if own[0] is None else f", {own[0]:.3g} before the reduction"
    most = [origin.rank for origin, one in zip(origins, own, strict=True) if one == own[0]]
    rest = [origin.rank for origin in origins if origin.rank not in most]
    whose = f"{named(most)} on node {origins[0].node}" if len(most) == 1 else named(most)
    near = f"; more than half as much came from {named(sorted(rest), lower=True)}" if rest else ""
    return f"{whose} had the largest share in it{share}{near}."


def _of_given(first: Sighting, where: str) -> tuple[str, ...]:
    """What an optimizer was given, whose weights are not known to be bad."""
    update = first.update
    if update is None or update.evidence is None:
        return ()
    optimizer = _with_settings(update)
    when = f"step {first.step} (round {first.round})"
    given = (
        f"{optimizer[:1].upper()}{optimizer[1:]} was given a gradient of {first.parameter}"
        f"{which_model(first)} that was {value_word(first.value)} at {when}{where}."
    )
    if first.parameter is None:
        given = f"The update of {when} by {optimizer} was about to make weights not finite{where}."
    return (given, _shown_by(update, update.evidence))


def _of_weights(first: Sighting, where: str) -> tuple[str, ...]:
    """Which weights are bad, and what made them so, as far as it is known."""
    update = first.update
    what = f"the weight {first.parameter}" if first.bad_weights else "weights"
    model = which_model(first)
    value = value_word(first.value)
    others = more_weights(first)
    if update is None or update.evidence is None:
        found = (
            f"{what[:1].upper()}{what[1:]}{model} was {value}{where} before the update of step {first.step}"
        )
        if not first.bad_weights:
            found = f"Weights{model} were not finite{where} before the update of step {first.step}"
        # The round in which they were found is the one before that step's.
        return (f"{found}{others}.", *since_when(first))
    made = (
        f"The update of step {first.step} (round {first.round}) by {_with_settings(update)} made "
        f"{what}{model} {value}{where}{others}."
    )
    return (made, _shown_by(update, update.evidence))


def _shown_by(update: Update, evidence: UpdateEvidence) -> str:
    """What shows that an update made weights bad, or was about to."""
    total = update.gradients_total
    first_one = f" ({update.gradient} is the first)" if update.gradient and total > 1 else ""
    return _EVIDENCE[evidence].format(
        gradients=f"that of {update.gradient} was"
        if total == 1 and update.gradient
        else f"{total or 'some'} of them{first_one} were",
        them="it" if total == 1 and update.gradient else "them",
        rate="not finite" if update.learning_rate is None else number(update.learning_rate),
        eps="" if update.eps is None else f" of {update.eps:.3g}",
    )


def _with_settings(update: Update) -> str:
    """The optimizer, with what it was set to."""
    known = []
    if update.eps is not None:
        known.append(f"eps {update.eps:.3g}")
    if update.learning_rate is not None:
        known.append(f"learning rate {number(update.learning_rate)}")
    settings = f" ({', '.join(known)})" if known else ""
    return f"{update.optimizer or 'the optimizer'}{settings}"


def _where(first: Sighting, ranks: Sequence[int], others: Sequence[int]) -> str:
    """On which ranks."""
    if not others and len(ranks) > 1:
        return " on all ranks"
    if len(ranks) == 1:
        return f" on rank {first.rank} (node {first.node})"
    return f" on {named(ranks, lower=True)}"


def _how_reduced(reduced: Sighting | None) -> tuple[str, ...]:
    """How a sum of finite gradients came to be bad. The dtype in which they were reduced is not known."""
    value = None if reduced is None else reduced.value
    if reduced is not None and value in _INFINITIES:
        largest = None if reduced.dtype is None else LARGEST.get(reduced.dtype)
        sum_ = "An infinite sum of finite values is more than the dtype can hold in which it was reduced"
        if largest is None:
            return (f"{sum_}.", f"{_REDUCE_WIDER} {_HOOKS}")
        if reduced.dtype == HALF:
            return (f"{sum_}; the gradient's is float16, which ends at 65504.", _REDUCE_WIDER)
        dtypes = (
            f"the gradient's is {reduced.dtype}, which ends at {largest:.3g}, or a shorter one into which a "
            "communication hook, compression or the transport had put it"
        )
        return (f"{sum_}: {dtypes}.", _HOOKS)
    came = "not finite" if value is None else VALUES[value]
    return (
        f"So no rank's own gradients made it, and how their sum came to be {came} is not known.",
        _HOOKS,
    )
