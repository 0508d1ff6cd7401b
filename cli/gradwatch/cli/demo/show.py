"""How the demo looks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from gradwatch.cli import output
from gradwatch.cli.demo import faults

if TYPE_CHECKING:
    from rich.progress import TaskID

    from gradwatch.cli.demo.run import Outcome


class Quiet:
    """Shows nothing."""

    def step(self, step: int, loss: str) -> None:
        """As `run.Display`."""

    def line(self, text: str) -> None:
        """As `run.Display`."""

    def ended(self) -> None:
        """As `run.Display`."""


class Progress:
    """A bar of training steps, with the launcher's lines above it.

    Args:
        fault: what is broken.
    """

    def __init__(self, fault: faults.Fault) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeElapsedColumn(),
        )
        self._task: TaskID | None = None
        self._interactive = self._bar.console.is_terminal
        typer.echo(f"Training a small GPT on {faults.RANKS} ranks; {fault.says}.")
        if self._interactive:
            self._task = self._bar.add_task("starting torchrun", total=faults.plant(0, fault).steps)
            self._bar.start()

    def step(self, step: int, loss: str) -> None:
        """As `run.Display`."""
        text = f"step {step}, loss {loss}"
        if self._task is None:
            typer.echo(text)
            return
        self._bar.update(self._task, completed=step + 1, description=text)

    def ended(self) -> None:
        """As `run.Display`."""
        if self._task is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """As `run.Display`."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_outcome(outcome: Outcome, *, json: bool) -> None:
    """Print the verdict, what was planted, and the metrics."""
    if json:
        output.print_json(
            {
                "correct": outcome.correct,
                "finite": outcome.finite,
                "planted": {
                    **dataclasses.asdict(outcome.planted),
                    "parameter": outcome.planted.parameter,
                    "cause": outcome.planted.cause,
                },
                "incident": outcome.incident,
                "metrics_url": outcome.metrics_url,
                "metrics": outcome.metrics,
                "report": outcome.report,
            }
        )
        return
    planted = outcome.planted
    typer.echo("")
    _print_verdict(outcome)
    typer.echo("")
    typer.echo(f"Planted: {planted.sentence}")
    typer.echo("The verdict is right." if outcome.named_right else "THE VERDICT IS NOT WHAT WAS PLANTED.")
    decisions = [one for one in outcome.report["decisions"] if one["action"] != "none"]
    if decisions:
        typer.echo("")
        typer.echo("Decided:")
    for decision in decisions:
        came_of_it = f" ({decision['concluded']})" if decision["concluded"] else ""
        typer.echo(f"  {decision['action']}, {decision['outcome']}: {decision['reason']}{came_of_it}")
    typer.echo(f"The weights are {'finite' if outcome.finite else 'NOT FINITE'} in the end.")
    typer.echo("")
    typer.echo(f"Scraped from {outcome.metrics_url}, while the demo's collector ran:")
    for line in outcome.metrics:
        typer.echo(f"  {line}")


def _print_verdict(outcome: Outcome) -> None:
    incident = outcome.incident
    if incident is None:
        typer.echo("No incident was reported.")
        return
    typer.echo(f"Verdict, {incident['status']}:")
    for sentence in incident["verdict"]:
        output.print_line(f"  {sentence}")
    first = incident["first"] or {}
    output.print_table(
        ["rank", "node", "step", "parameter", "value", "clean ranks"],
        [
            [
                first.get("rank"),
                first.get("node"),
                first.get("step"),
                first.get("parameter"),
                first.get("value"),
                ", ".join(map(str, incident["clean_ranks"])),
            ]
        ],
    )
