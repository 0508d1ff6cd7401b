"""`gradwatch demo`: see it work, on this machine, in a minute."""

from typing import Annotated

import typer

from gradwatch.cli import options


def demo(
    seed: Annotated[
        int | None,
        typer.Option(envvar="GRADWATCH_DEMO_SEED", help="Where the fault lies.", show_default="random"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Train a small GPT on 4 ranks, flip one bit in one rank's data, and see who is named.

    Exits with 1 when the verdict is not what was planted.
    """
    import secrets

    from gradwatch.cli.demo import show
    from gradwatch.cli.demo.run import run_demo

    planted_by = secrets.randbelow(10**6) if seed is None else seed
    display = show.Quiet() if json else show.Progress()
    outcome = run_demo(planted_by, display)
    show.print_outcome(outcome, json=json)
    raise typer.Exit(0 if outcome.correct else 1)
