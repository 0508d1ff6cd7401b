"""A sample of the campaign; the whole of it is `make campaign`."""

from __future__ import annotations

import random

import pytest

from tests.campaign.run import campaign


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_forty_random_faults_are_named_right_and_clean_models_raise_none():
    seed = random.SystemRandom().randrange(1 << 30)
    table, wrong = campaign(faults=40, clean=12, seed=seed, world_sizes=[2, 4])
    assert wrong == [], f"seed {seed}\n{table}"
