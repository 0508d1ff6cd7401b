"""`gradwatch demo`: see it work, on this machine, in a minute."""

from pathlib import Path
from typing import Annotated

import typer

from gradwatch.cli import options
from gradwatch.cli.demo.faults import Fault


def demo(
    seed: Annotated[
        int | None,
        typer.Option(envvar="GRADWATCH_DEMO_SEED", help="Where the fault lies.", show_default="random"),
    ] = None,
    fault: Annotated[
        Fault,
        typer.Option(
            envvar="GRADWATCH_DEMO_FAULT",
            help="What is broken. " + " ".join(f"{one.value}: {one.says}." for one in Fault),
        ),
    ] = Fault.FLIPPED_BIT,
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar="GRADWATCH_POLICY",
            metavar="FILE",
            help="The policy to train under; its checkpoints.root is replaced by a folder of the demo's.",
            show_default="none",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train a small GPT on 4 ranks with damaged data, see who is named, and what a policy does about it.

    Exits with 1 when the verdict is not what was planted, or when the weights are not finite in the end
    although the policy was to be enforced.
    """
    import secrets

    from gradwatch.cli.demo import show
    from gradwatch.cli.demo.run import run_demo

    planted_by = secrets.randbelow(10**6) if seed is None else seed
    display = show.Quiet() if json else show.Progress(fault)
    outcome = run_demo(planted_by, display, fault, policy)
    show.print_outcome(outcome, json=json)
    raise typer.Exit(0 if outcome.correct else 1)
