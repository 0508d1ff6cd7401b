"""Hold a rule's conditions against what is known of an incident. Pure.

A condition on something that is not known does not hold, and says so.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from gradwatch.collector.policy.decision import Looked, Verdict
from gradwatch.collector.policy.facts import Unknown
from gradwatch.collector.policy.model import IF_WEIGHTS_ARE_BAD
from gradwatch.collector.policy.sentences import conditions

if TYPE_CHECKING:
    import enum
    from collections.abc import Iterator, Sequence

    from gradwatch.collector.policy.compare import Comparison
    from gradwatch.collector.policy.facts import Facts, Known
    from gradwatch.collector.policy.model import Match, Rule

_Result = tuple[Verdict, str]
_HOLDS: _Result = (Verdict.MATCHES, "")


def look(rule: Rule, facts: Facts) -> Looked:
    """Whether the rule matches, and why.

    The verdict is `NOT_YET` when it differs only in what may grow while the incident goes on.
    """
    results = list(_results(rule.match, facts))
    for verdict in (Verdict.DIFFERS, Verdict.UNKNOWN, Verdict.NOT_YET):
        why = next((why for found, why in results if found is verdict), None)
        if why is not None:
            return Looked(rule.name, verdict, why)
    return Looked(rule.name, Verdict.MATCHES, conditions(rule.match))


def _results(match: Match, facts: Facts) -> Iterator[_Result]:
    yield _of_weights(match.cause, facts.cause, facts) or _among("cause", match.cause, facts.cause)
    yield _of_weights(match.phase, facts.phase, facts) or _among("phase", match.phase, facts.phase)
    yield _among("value", match.value, facts.value)
    yield _fits("node", match.node, facts.node)
    yield _fits("parameter", match.parameter, facts.parameter)
    yield _compares("step", match.step, facts.step)
    yield _compares("rank", match.rank, facts.rank)
    yield _compares("origins", match.origins, facts.origins)
    if match.count is not None:
        count = facts.count(same_rank=match.same_rank, within_steps=match.within_steps)
        yield _compares("count", match.count, count)
    yield _compares(
        "consecutive_bad_steps",
        match.consecutive_bad_steps,
        facts.consecutive_bad_steps,
        grows=facts.goes_on,
    )
    if match.guard_exhausted is not None:
        yield _guard(facts.guard_exhausted, wanted=match.guard_exhausted, grows=facts.goes_on)


def _of_weights(wanted: Sequence[enum.Enum] | None, known: Known[enum.Enum], facts: Facts) -> _Result | None:
    """Whether an update holds for a word that means bad weights; None when it is not about that."""
    if wanted is None or isinstance(known, Unknown) or known in wanted:
        return None
    if IF_WEIGHTS_ARE_BAD.get(known) not in wanted:
        return None
    if isinstance(facts.weights_bad, Unknown):
        verdict = Verdict.NOT_YET if facts.goes_on else Verdict.UNKNOWN
        return verdict, f"weights: {facts.weights_bad.why}"
    return _HOLDS if facts.weights_bad else (Verdict.DIFFERS, "the update made no weights bad")


def _among(key: str, wanted: Sequence[enum.Enum] | None, known: Known[enum.Enum]) -> _Result:
    if wanted is None:
        return _HOLDS
    if isinstance(known, Unknown):
        return Verdict.UNKNOWN, f"{key}: {known.why}"
    return _HOLDS if known in wanted else (Verdict.DIFFERS, f"{key} is {known.value}")


def _fits(key: str, patterns: Sequence[str] | None, known: Known[str]) -> _Result:
    if patterns is None:
        return _HOLDS
    if isinstance(known, Unknown):
        return Verdict.UNKNOWN, f"{key}: {known.why}"
    holds = any(fnmatchcase(known, pattern) for pattern in patterns)
    return _HOLDS if holds else (Verdict.DIFFERS, f"{key} is {known}")


def _compares(key: str, comparison: Comparison | None, known: Known[int], *, grows: bool = False) -> _Result:
    if comparison is None:
        return _HOLDS
    if isinstance(known, Unknown):
        return Verdict.UNKNOWN, f"{key}: {known.why}"
    if comparison(known):
        return _HOLDS
    verdict = Verdict.NOT_YET if grows and comparison.may_yet(known) else Verdict.DIFFERS
    return verdict, f"{key} is {known}"


def _guard(known: Known[bool], *, wanted: bool, grows: bool) -> _Result:
    if isinstance(known, Unknown):
        return Verdict.UNKNOWN, f"guard_exhausted: {known.why}"
    if known is wanted:
        return _HOLDS
    verdict = Verdict.NOT_YET if grows and wanted else Verdict.DIFFERS
    return verdict, f"guard_exhausted is {'true' if known else 'false'}"
