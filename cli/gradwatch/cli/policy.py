"""`gradwatch policy check` and `gradwatch policy test`: what a policy file does, before it does it."""

from pathlib import Path
from typing import Annotated

import typer

from gradwatch.cli import options

app = typer.Typer(help="Check a policy file, and try it on recorded history.", no_args_is_help=True)

PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The policy file.")]


@app.command("check")
def check(file: PolicyFile, json: options.Json = False) -> None:
    """Say what a policy will do; exit code 1 with everything that is wrong in it, if something is."""
    from gradwatch.cli import output, policy_files
    from gradwatch.collector.policy.document import load_policy, policy_hash
    from gradwatch.collector.policy.problems import PolicyError
    from gradwatch.collector.policy.sentences import explain

    source = policy_files.read(file)
    try:
        policy = load_policy(source, str(file))
    except PolicyError as error:
        if not json:
            raise policy_files.complaint(error) from None
        output.print_json(policy_files.checked(file, error.problems))
        raise typer.Exit(1) from None
    if json:
        output.print_json(policy_files.checked(file, (), policy))
        return
    typer.echo(f"{file} is a policy, hash {policy_hash(policy)}")
    for line in explain(policy):
        typer.echo(f"  {line}")


@app.command("test")
def try_on(
    file: PolicyFile,
    events: Annotated[
        Path,
        typer.Argument(
            metavar="EVENTS", help="The lines of `gradwatch events JOB --json`; - for standard input."
        ),
    ],
    json: options.Json = False,
    confirm_timeout: Annotated[
        float,
        typer.Option(
            "--confirm-timeout",
            envvar="GRADWATCH_CONFIRM_TIMEOUT",
            min=0.0,
            metavar="SECONDS",
            help="After how long a silent rank is named unknown; as the collector had it.",
        ),
    ] = 30.0,
) -> None:
    """Say what a policy would have done in a recorded history; with --json one incident a line."""
    import sys

    from gradwatch.cli import output, policy_files
    from gradwatch.cli.errors import CliError
    from gradwatch.collector.model import FoldConfig
    from gradwatch.collector.policy.document import load_policy
    from gradwatch.collector.policy.log import read_log
    from gradwatch.collector.policy.problems import EventsError, PolicyError
    from gradwatch.collector.policy.replay import replay

    try:
        policy = load_policy(policy_files.read(file), str(file))
        text = policy_files.read(events).decode(errors="replace")
        replayed = replay(read_log(text.splitlines(), str(events)), policy, FoldConfig(confirm_timeout))
    except PolicyError as error:
        raise policy_files.complaint(error) from None
    except EventsError as error:
        raise CliError(str(error)) from None
    for assumption in replayed.assumptions:
        sys.stderr.write(f"gradwatch: {assumption}\n")
    if json:
        output.print_json_lines(policy_files.row_document(row) for row in replayed.rows)
    elif replayed.rows:
        output.print_table(policy_files.COLUMNS, [policy_files.row_cells(row) for row in replayed.rows])
    else:
        typer.echo("there are no incidents in that history")
