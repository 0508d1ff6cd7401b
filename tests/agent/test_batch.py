"""What is known of the batch that went bad."""

from __future__ import annotations

import math

import pytest
import torch

from gradwatch.agent.probe.autopsy.capsule import Capsule
from gradwatch.agent.probe.phases.batch import hash_of, value_of

NAN, INF = math.nan, math.inf
NAMES = {NAN: "VALUE_NAN", INF: "VALUE_POSITIVE_INFINITY", -INF: "VALUE_NEGATIVE_INFINITY"}


@pytest.mark.parametrize(
    ("numbers", "worst"),
    [([1, NAN, INF], NAN), ([-INF, 2, INF], INF), ([-INF, 2], -INF), ([1, 2], None)],
)
def test_the_worst_that_it_held(numbers, worst):
    mask = torch.full((2, 2), -INF) if worst != -INF and worst is not None else torch.zeros(2)
    capsule = Capsule((torch.tensor(numbers), {"ids": torch.tensor([1, 2])}), {"mask": mask})
    assert value_of(capsule) == NAMES.get(worst)
    assert hash_of(capsule) != ""


def test_of_what_was_not_kept_nothing_is_known():
    capsule = Capsule((torch.tensor([NAN]),))
    capsule.release()
    assert (value_of(capsule), hash_of(capsule)) == (None, "")
