"""The campaign of rollbacks: real jobs, poisoned again and again, and do they all go back and end well?

usage: python -m tests.campaign.rollbacks [--count 50] [--ranks 4] [--nodes 1]
       python -m tests.campaign.rollbacks --nodes 2 --count 20

Most of the rollbacks are in a row, in one job whose fault strikes anew after each resume; the others
are of jobs of their own: with workers that ignore SIGTERM, that save the poisoned weights in its handler,
and that die of the fault by themselves. On two nodes, one of the rollbacks has the launcher of node 1 killed
by SIGKILL, and the same command started again.

A rollback has succeeded when it was performed once, the job went on from the newest good checkpoint, and
the job then ended with 0 and the weights, to the bit, of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.agent.test_bitwise import same_bits
from tests.campaign.cluster import OneNode, TwoNodes
from tests.cli.command import processes_with
from tests.ranks import run_ranks
from tests.recovery import Gate, Place, performed, write_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.campaign.cluster import Cluster

SAVE_EVERY = 2
# The fault strikes in the update that the second save after a resume follows at once.
STRIKES_AFTER = 2 * SAVE_EVERY - 1
SECONDS_PER_ROLLBACK = 120.0
VARIANTS: dict[str, list[object]] = {
    "ignores SIGTERM": ["--on-sigterm", "ignore"],
    "saves at SIGTERM": ["--on-sigterm", "save"],
    "dies by itself": ["--crash"],
}


@dataclass(frozen=True)
class Story:
    """One job.

    Attributes:
        rollbacks: how many, in a row.
        kill_at: in the how manieth of them a launcher is killed; None for never.
    """

    name: str
    rollbacks: int
    script: tuple[object, ...] = ()
    kill_at: int | None = None

    @property
    def steps(self) -> int:
        """Each rollback is one checkpoint further on than the one before it."""
        return SAVE_EVERY * (self.rollbacks + 2)


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        seconds: from each decision to the first update after it; as far as both are known.
        wrong: what was not as it should be; then none of its rollbacks counts as a success.
    """

    story: Story
    seconds: list[float]
    wrong: list[str]


def stories(count: int, nodes: int) -> list[Story]:
    """So many rollbacks, as the head of this file says."""
    separate = [Story(name, 1, tuple(script)) for name, script in VARIANTS.items()]
    if count <= 2 * len(separate):
        separate = []
    in_a_row = count - len(separate)
    kill_at = (in_a_row + 1) // 2 if nodes > 1 else None
    return [Story("in a row", in_a_row, (), kill_at), *separate]


class Campaign:
    """Runs stories.

    Args:
        cluster: where.
        folder: for everything.
        say: gets a line per rollback.
    """

    def __init__(self, cluster: Cluster, folder: Path, say: Callable[[str], object] = print) -> None:
        self._cluster, self._folder, self._say = cluster, folder, say
        self._undisturbed: dict[int, dict[str, torch.Tensor]] = {}

    def run(self, story: Story) -> Outcome:
        """One job, to its end."""
        name = story.name.replace(" ", "-").lower()
        place = Place(self._folder / name)
        write_policy(
            self._cluster.policy,
            place.checkpoints,
            budgets={"job": story.rollbacks, "same_first_bad_step": 1},
        )
        script = place.training(
            *("--steps", story.steps, "--save-every", SAVE_EVERY),
            *("--bad-rank", self._cluster.ranks - 1, "--bad-step", STRIKES_AFTER),
            *("--bad-when", story.rollbacks, "--bad-after-resume"),
            *story.script,
        )
        with ExitStack() as stack:
            job = self._cluster.job(name, place.folder, script)
            stack.callback(job.kill)
            stack.enter_context(Gate(name, place.gate, job.url, **self._cluster.credentials))
            in_time = self._watch(story, place, job)
            codes = job.finish() if in_time else []
        report = job.report()
        wrong = list(self._mistakes(story, place, codes, report))
        wrong += [] if in_time else ["it did not end in time"]
        return Outcome(story, _seconds(place, report), wrong)

    def _watch(self, story: Story, place: Place, job) -> bool:
        """Tell of each rollback as it happens; whether the job ended in time."""
        told, kill_at = 1, story.kill_at
        until = time.monotonic() + SECONDS_PER_ROLLBACK * (story.rollbacks + 1)
        while job.runs:
            if kill_at is not None and place.strikes >= kill_at:
                kill_at = None
                job.kill_a_launcher_and_start_it_again()
                self._say(f"  {story.name}: a launcher was killed, and is started again")
            beginnings = place.beginnings
            for _, step in beginnings[told:]:
                self._say(f"  {story.name}: rollback {told} of {story.rollbacks} went on from step {step}")
                told += 1
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
        return True

    def _mistakes(self, story: Story, place: Place, codes: list[int], report: dict):
        if any(codes) or not codes:
            yield f"the launchers ended with {codes}"
        steps = [step for _, step in place.beginnings]
        expected = [SAVE_EVERY * number for number in range(story.rollbacks + 1)]
        if steps != expected:
            yield f"it began at the steps {steps}, not {expected}"
        done = sorted(one["checkpoint"]["step"] for one in performed(report))
        if done != expected[1:]:
            yield f"rollbacks were performed to {done}, not {expected[1:]}"
        if place.strikes != story.rollbacks:
            yield f"the fault struck {place.strikes} times"
        if not place.weights.exists():
            yield "there are no final weights"
        elif not same_bits(torch.load(place.weights), self._weights(story.steps)):
            yield "the final weights are not those of a run without the fault"
        left = processes_with(str(place.folder))
        if left:
            yield f"processes are left: {left}"

    def _weights(self, steps: int) -> dict[str, torch.Tensor]:
        """Of a run of so many steps that nothing happened to."""
        if steps not in self._undisturbed:
            place = Place(self._folder / f"undisturbed-{steps}")
            arguments = [*("--folder", place.checkpoints, "--weights", place.weights)]
            arguments += ["--steps", steps, "--save-every", SAVE_EVERY]
            run_ranks("tests.training.resumable", self._cluster.ranks, [str(one) for one in arguments])
            self._undisturbed[steps] = torch.load(place.weights)
        return self._undisturbed[steps]


def _seconds(place: Place, report: dict) -> list[float]:
    decided = sorted(_timestamp(one["at"]) for one in performed(report))
    first_updates = [at for at, _ in place.beginnings[1:]]
    return [after - at for at, after in zip(decided, first_updates, strict=False)]


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def table(outcomes: list[Outcome]) -> str:
    """What came out of it."""
    rows = [f"  {'':<18} {'succeeded':>10} {'median s, decision to first step':>34}"]
    for one in outcomes:
        good = 0 if one.wrong else one.story.rollbacks
        median = f"{statistics.median(one.seconds):.1f}" if one.seconds else "-"
        rows.append(f"  {one.story.name:<18} {f'{good} of {one.story.rollbacks}':>10} {median:>34}")
        rows += [f"    WRONG: {text}" for text in one.wrong]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--nodes", type=int, choices=[1, 2], default=1)
    parser.add_argument("--ranks", type=int, help="in all; 4, or 2 on two nodes")
    parser.add_argument("--folder", type=Path, help="keep everything there, instead of in a temporary one")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = arguments.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="gradwatch-rollbacks-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        kind = OneNode if arguments.nodes == 1 else TwoNodes
        cluster = stack.enter_context(kind(folder, arguments.ranks or (4 if arguments.nodes == 1 else 2)))
        campaign = Campaign(cluster, folder, lambda text: print(text, flush=True))
        outcomes = [campaign.run(story) for story in stories(arguments.count, arguments.nodes)]
    print(table(outcomes))
    good = sum(0 if one.wrong else one.story.rollbacks for one in outcomes)
    seconds = [second for one in outcomes for second in one.seconds]
    median = f"{statistics.median(seconds):.1f} s" if seconds else "not known"
    print(f"{good} of {arguments.count} succeeded; median from decision to first step: {median}")
    return 0 if good == arguments.count else 1


if __name__ == "__main__":
    sys.exit(main())
