"""The `gradwatch` command.

A command's module holds its options and imports what it needs when it is called: so
`gradwatch --help` costs the same however much there is behind it.
"""

import sys

import typer

from gradwatch.cli import (
    audit,
    checkpoints,
    collector,
    doctor,
    events,
    incident,
    incidents,
    jobs,
    policy,
    rollback,
    run_command,
    sidecar,
    tokens,
)
from gradwatch.cli.demo import command as demo
from gradwatch.cli.errors import CliError
from gradwatch.cli.top import command as top

app = typer.Typer(
    name="gradwatch",
    help="Names the rank, step and parameter that first went non-finite in distributed PyTorch training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# An option after the command belongs to the command, as with `env` or `nice`.
app.command("run", context_settings={"allow_interspersed_args": False})(run_command.run)
app.command("demo")(demo.demo)
app.command("incidents")(incidents.incidents)
app.command("incident")(incident.incident)
app.command("events")(events.events)
app.command("jobs")(jobs.jobs)
app.command("top")(top.top)
app.command("audit")(audit.audit)
app.command("rollback")(rollback.rollback)
app.command("doctor")(doctor.doctor)
app.command("collector")(collector.collector)
app.command("sidecar")(sidecar.sidecar)
app.add_typer(policy.app, name="policy")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(tokens.app, name="token")


def run() -> None:
    """The console script: like `app`, with our own errors as one line and an exit code."""
    try:
        app()
    except CliError as error:
        sys.stderr.write(f"gradwatch: {error}\n")
        sys.exit(error.exit_code)
