"""How an incident's page tells the spread: it says what the verdict says, and no more."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from selenium.webdriver.common.by import By

from gradwatch.collector.app import running
from gradwatch.protos.v1 import gradwatch_pb2 as pb
from tests.collector.client import batch, hello, progress, sidecar
from tests.collector.running import config
from tests.page.site import chromium, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.e2e

BAD = pb.BadGradient(parameter="a.weight", module="a", module_class="Linear", value=pb.VALUE_NAN, count=1)
WEIGHT = pb.BadWeight(parameter="a.weight", value=pb.VALUE_NAN, count=1, numel=10)


def nonfinite(**fields: Any) -> dict[str, Any]:
    return {"nonfinite": pb.NonFinite(round=5, step=5, gradients=[BAD], source="ddp-bucket", **fields)}


def weights(**fields: Any) -> dict[str, Any]:
    return {"weights": pb.BadWeights(round=5, step=5, optimizer="Adam", **fields)}


GIVEN = weights(evidence=pb.UPDATE_EVIDENCE_GRADIENTS, gradients=[BAD], gradients_total=1)
MADE = weights(evidence=pb.UPDATE_EVIDENCE_STATE, weights=[WEIGHT], weights_total=1)
OVERFLOW = {
    "optimizer_state": pb.OptimizerState(
        round=5,
        step=5,
        parameter="a.weight",
        magnitude=3e30,
        limit=1e19,
        local_magnitude=3e30,
        optimizer="Adam",
    )
}
# By job: what rank 1 of two says, what the page tells of it, and what it does not tell.
CHAINS = {
    "batch": (
        [nonfinite(phase=pb.PHASE_INPUT)],
        ["the batch", "gradient on the first rank", "all-reduce", "no other rank was bad afterwards"],
        ["weight on"],
    ),
    "exchanged": (
        [nonfinite(phase=pb.PHASE_INPUT, exchanged=True)],
        ["what entered its part", "may have come from another rank"],
        ["the batch"],
    ),
    "skipped": (
        [GIVEN, {"skipped": pb.Skipped(step=5, round=5, consecutive=1, in_last_1000=1)}],
        ["was given a gradient that was not finite", "gradient on the first rank", "The guard skipped"],
        ["made weights", "weight on", "all-reduce"],
    ),
    "update": (
        [MADE],
        ["made weights non-finite", "weight on the first rank"],
        ["all-reduce", "gradient on"],
    ),
    # A device tells only that they are bad.
    "weights": ([weights()], ["the weights"], ["all-reduce", "gradient on", "weight on"]),
    "overflow": (
        [OVERFLOW],
        ["was finite, and too large for the optimizer's state"],
        ["all-reduce", "turned", "no other rank was bad afterwards"],
    ),
}
REPLICA = (
    ["are not those of the other ranks"],
    ["all-reduce", "turned", "gradient", "no other rank was bad afterwards"],
)


def report(job: str, rank: int, world_size: int, *bodies: dict[str, Any]) -> tuple[pb.Batch, pb.Progress]:
    incarnation = f"{job}-{rank}"
    records = [pb.Record(seq=1 + place, at=time.time(), **body) for place, body in enumerate(bodies)]
    bad_rounds = sum("nonfinite" in body for body in bodies)
    return (
        batch(incarnation, hello(incarnation, rank, world_size, job=job), *records),
        progress(incarnation, 6, 1 + len(bodies), bad_rounds=bad_rounds),
    )


def all_reports() -> pb.Report:
    parts = [report(job, 1, 2, *bodies) for job, (bodies, _, _) in CHAINS.items()]
    parts += [report(job, 0, 2) for job in CHAINS]
    for rank in range(3):
        checksum = pb.Checksum(round=5, step=5, parameters=1, sums=[7 + rank // 2])
        parts.append(report("replica", rank, 3, {"checksum": checksum}))
    return pb.Report(batches=[one for one, _ in parts], progress=[one for _, one in parts])


def test_the_chain_says_what_the_verdict_says(tmp_path: Path):
    expected = {job: (told, untold) for job, (_, told, untold) in CHAINS.items()} | {"replica": REPLICA}

    async def look() -> dict[str, str]:
        async with running(config(tmp_path)) as info, sidecar(info.grpc) as agent:
            await agent.send(all_reports())
            return await asyncio.to_thread(read_all, info.http)

    def read_all(url: str) -> dict[str, str]:
        chains = {}
        with chromium() as browser:
            for job in expected:
                (incident,) = httpx.get(f"{url}/api/v1/incidents?job={job}").json()
                browser.get(f"{url}/#/incidents/{incident['id']}")
                chains[job] = until(lambda: chain_of(browser), seconds=30)
                browser.get("about:blank")
        return chains

    def chain_of(browser: Any) -> str:
        return " | ".join(one.text for one in browser.find_elements(By.CSS_SELECTOR, "ol.chain"))

    chains = asyncio.run(asyncio.wait_for(look(), 120))
    for job, (told, untold) in expected.items():
        assert [words for words in told if words not in chains[job]] == [], (job, chains[job])
        assert [words for words in untold if words in chains[job]] == [], (job, chains[job])
