"""`gradwatch checkpoints`: look at checkpoints on disk, and bring back what was set aside."""

from pathlib import Path
from typing import Annotated

import typer

from gradwatch.agent.checkpoints.result import Layout
from gradwatch.cli import options

app = typer.Typer(help="Look at checkpoints on disk; bring back what was set aside.", no_args_is_help=True)


@app.command("scan")
def scan(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR|URL", help="Where checkpoints lie, or one of them: a path, or s3://…"),
    ],
    layout: Annotated[
        Layout, typer.Option(envvar="GRADWATCH_LAYOUT", help="The only kind of checkpoint to look for.")
    ] = Layout.AUTO,
    json: options.Json = False,
) -> None:
    """Tell which checkpoints are complete and finite, and where they are not.

    Exits with 1 when one of them is torn, not finite or cannot be read.
    """
    from gradwatch.agent.checkpoints.place import place_of
    from gradwatch.cli import checkpoints_scan, output

    place = place_of(folder)
    results = checkpoints_scan.scan_all(place, layout, quiet=json)
    if json:
        output.print_json({"root": folder, "checkpoints": [result.to_json() for result in results]})
    elif not results:
        typer.echo(f"no checkpoints under {folder}")
    else:
        output.print_table(
            checkpoints_scan.COLUMNS, [checkpoints_scan.row(result, place) for result in results]
        )
    raise typer.Exit(int(any(checkpoints_scan.is_bad(result) for result in results)))


@app.command("restore")
def restore(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="What it was set aside under.")],
    root: Annotated[
        Path, typer.Option(envvar="GRADWATCH_CHECKPOINT_ROOT", help="The folder that the checkpoints lay in.")
    ],
) -> None:
    """Bring back checkpoints that a rollback has set aside, to where they were. All of them, or none."""
    from gradwatch.agent.checkpoints import quarantine
    from gradwatch.agent.checkpoints.moves import Refused
    from gradwatch.cli.errors import CliError

    done = quarantine.restore(root, identifier)
    if isinstance(done, Refused):
        raise CliError(done.message)
    for path in done.paths:
        typer.echo(f"restored {root / path}")
