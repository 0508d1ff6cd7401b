"""A verdict in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwatch.collector.model import Operator, UnknownReason
from gradwatch.collector.observations import Phase, Value
from gradwatch.collector.sentences import explain
from gradwatch.collector.sightings import sighting_of
from tests.collector.history import GRADIENT_PHASES, gradient, hello, nonfinite


def seen(rank: int, **changes: object):
    return sighting_of(hello(rank, 32), nonfinite(5, gradient("a.weight", **changes)))


@pytest.mark.parametrize(
    ("position", "words"),
    [(0, "1st"), (1, "2nd"), (2, "3rd"), (3, "4th"), (10, "11th"), (20, "21st"), (111, "112th")],
)
def test_the_place_in_the_backward_pass(position: int, words: str):
    (sentence,) = explain([seen(2, position=position)], tie=False, clean=[], unknown={}, contaminated=[])
    assert sentence.endswith(f", the {words} gradient to arrive in that backward pass.")


@pytest.mark.parametrize("phase", GRADIENT_PHASES)
def test_the_phase_is_a_sentence_of_its_own(phase: Phase):
    first, about = explain(
        [sighting_of(hello(2, 32), nonfinite(5, phase=phase))],
        tie=False,
        clean=[],
        unknown={},
        contaminated=[],
    )
    assert "was first" in first
    says = {
        Phase.INPUT: "bad data",
        Phase.PARAMETER: "Its weights were not finite before that step",
        Phase.FORWARD: "Its batch and its weights were finite, and what its forward pass gave was not",
        Phase.LOSS: "the gradient of the loss was not",
        Phase.BACKWARD: "went bad on its way back",
    }
    assert says[phase] in about


def test_a_later_micro_batch_is_named():
    (sentence,) = explain(
        [sighting_of(hello(2, 32), nonfinite(5, microbatch=2))],
        tie=False,
        clean=[],
        unknown={},
        contaminated=[],
    )
    assert "at step 5 (round 5, micro-batch 2)" in sentence


def test_what_is_not_known_is_not_said():
    (sentence,) = explain(
        [seen(2, position=None, value=None)], tie=False, clean=[], unknown={}, contaminated=[]
    )
    assert sentence == (
        "Rank 2 on node n2 was first: the gradient of a.weight turned non-finite at step 5 (round 5)."
    )


DIVIDED = Operator("aten.div.Tensor", Phase.FORWARD, None, None, "train.py:9", None, (), None, ())
LOGARITHM = replace(DIVIDED, name="aten.log.default", source="train.py:12")
BATCH = "the batch that it was given was not finite: bad data."
MADE = "its batch and its weights were finite; aten.{} made it in the forward pass, called from train.py:{}."
DIV, LOG = MADE.format("div.Tensor", 9), MADE.format("log.default", 12)


def began(rank: int, phase: Phase | None, operator: Operator | None = None):
    return replace(sighting_of(hello(rank, 32), nonfinite(5, phase=phase)), operator=operator)


# What it was on each rank, the first one's first, and what is said of the others.
OTHERS = [
    ([(1, Phase.INPUT, None), (3, Phase.FORWARD, DIVIDED)], [f"On rank 3, {DIV}"]),
    ([(1, Phase.FORWARD, DIVIDED), (3, Phase.INPUT, None)], [f"On rank 3, {BATCH}"]),
    ([(1, Phase.FORWARD, DIVIDED), (3, Phase.FORWARD, LOGARITHM)], [f"On rank 3, {LOG}"]),
    (
        [(1, Phase.INPUT, None), (3, Phase.FORWARD, DIVIDED), (4, Phase.FORWARD, DIVIDED)],
        [f"On ranks 3 and 4, {DIV}"],
    ),
    # The same one, or one that is not known.
    ([(1, Phase.FORWARD, DIVIDED), (3, Phase.FORWARD, DIVIDED)], []),
    ([(1, Phase.FORWARD, None), (3, Phase.FORWARD, DIVIDED)], []),
    ([(1, Phase.INPUT, None), (3, None, None)], []),
    (
        [
            (1, Phase.INPUT, None),
            (2, Phase.FORWARD, DIVIDED),
            (3, Phase.FORWARD, LOGARITHM),
            (4, Phase.FORWARD, None),
            (5, Phase.LOSS, None),
            (6, Phase.BACKWARD, None),
        ],
        [
            f"On rank 2, {DIV}",
            f"On rank 3, {LOG}",
            "On rank 4, its batch and its weights were finite, and what its forward pass gave was not.",
            "2 more causes are known on other ranks.",
        ],
    ),
]


@pytest.mark.parametrize(("ranks", "says"), OTHERS)
def test_another_cause_on_another_rank_is_told(ranks, says):
    origins = [began(*one) for one in ranks]
    sentences = explain(origins, tie=False, clean=[], unknown={}, contaminated=[])
    assert [one for one in sentences if one.startswith("On rank") or "more cause" in one] == says


def test_nobody_is_first_in_a_tie():
    sentences = explain(
        [seen(1, value=Value.NEGATIVE_INFINITY), seen(3)], tie=True, clean=[], unknown={}, contaminated=[]
    )
    assert sentences[0].startswith(
        "Rank 1 on node n1 is named first, but ranks 1 and 3 share that position: "
        "the gradient of a.weight turned -Inf at step 5"
    )


def test_many_ranks_are_counted():
    sentences = explain(
        [seen(0)],
        tie=False,
        clean=range(1, 20),
        unknown={20: UnknownReason.SILENT, 21: UnknownReason.SILENT, 22: UnknownReason.PROCESS_ENDED},
        contaminated=range(1, 20),
    )
    assert sentences[1:] == (
        (
            "19 ranks were clean in that round; the all-reduce then spread it, "
            "and 19 ranks were bad after the update."
        ),
        "Ranks 20 and 21 are unknown; of each, nothing was heard of it for the confirm timeout.",
        "Rank 22 is unknown: its process ended before it had looked at the round.",
    )


PARAMETER, FORWARD = Phase.PARAMETER, Phase.FORWARD


@pytest.mark.parametrize(
    ("ranks", "clean", "unknown", "phase", "says"),
    [
        ([1], [0, 2], {}, FORWARD, "and not the batch: look at its batch."),
        ([1], [0, 2], {}, PARAMETER, "look at what changes weights there and on no other rank."),
        ([0, 1], [], {}, FORWARD, "look at what they share, such as the learning rate"),
        ([0, 1], [], {}, PARAMETER, "since all have the same weights."),
        # Bad data says itself where to look; and nothing follows from some ranks, from one alone, or
        # from what is not known.
        ([1], [0, 2], {}, Phase.INPUT, None),
        ([0, 1], [2], {}, FORWARD, None),
        ([0], [], {}, FORWARD, None),
        ([1], [0, 2], {}, None, None),
        ([1], [0], {2: UnknownReason.SILENT}, FORWARD, None),
    ],
)
def test_how_many_ranks_were_bad_says_where_to_look(ranks, clean, unknown, phase, says):
    origins = [sighting_of(hello(rank, 3), nonfinite(5, phase=phase)) for rank in ranks]
    sentences = explain(origins, tie=len(ranks) > 1, clean=clean, unknown=unknown, contaminated=[])
    about = [text for text in sentences if "look at" in text or "same weights" in text]
    assert len(about) == (says is not None)
    assert says is None or says in about[0]
