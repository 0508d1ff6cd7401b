"""A sample of the campaign of rollbacks; the whole of it is `make campaign-rollbacks`."""

from __future__ import annotations

import pytest

from tests.campaign.cluster import OneNode, TwoNodes
from tests.campaign.network import Network
from tests.campaign.rollbacks import Campaign, stories, table


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_two_rollbacks_in_a_row_succeed(tmp_path):
    """On two nodes a launcher is killed in the middle of the first, and started again."""
    told = []
    # Without root there is one node, and nobody is killed.
    nodes = 2 if Network.missing() is None else 1
    with TwoNodes(tmp_path, 2) if nodes == 2 else OneNode(tmp_path, 4) as cluster:
        campaign = Campaign(cluster, tmp_path, told.append)
        outcomes = [campaign.run(story) for story in stories(2, nodes)]
    wrong = [text for outcome in outcomes for text in outcome.wrong]
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.rglob("*.log")))
    assert wrong == [], f"{table(outcomes)}\n{logs}"
    assert [len(outcome.seconds) for outcome in outcomes] == [2]
    assert any("was killed" in line for line in told) == (nodes == 2)
