"""`gradwatch run`: run a command under watch."""

import datetime as dt
import enum
import os
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.cli import options, paths
from gradwatch.cli.errors import UsageError


class OnRollback(str, enum.Enum):
    """What a rollback ends in."""

    RESTART = "restart"
    EXIT = "exit"


def run(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD…", help="What to run.")],
    *,
    job: Annotated[
        str | None,
        typer.Option(
            envvar="GRADWATCH_JOB",
            help="The job's name.",
            show_default="from Slurm, else the script and time",
        ),
    ] = None,
    collector: options.Collector = None,
    state_dir: options.StateDir = None,
    http: Annotated[
        str | None,
        typer.Option(
            envvar="GRADWATCH_HTTP",
            metavar="HOST:PORT",
            help="Where the collector that runs along serves metrics and API.",
            show_default="127.0.0.1:7701, or a free port",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            envvar="GRADWATCH_REPORT", metavar="FILE", help="Write a JSON report when the job ends."
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar="GRADWATCH_POLICY",
            metavar="FILE",
            help="What is done when gradients go non-finite; see `gradwatch policy check`.",
        ),
    ] = None,
    on_rollback: Annotated[
        OnRollback,
        typer.Option(
            envvar="GRADWATCH_ON_ROLLBACK",
            help="Start the command again after a rollback, or exit with 75 and leave that to a supervisor.",
        ),
    ] = OnRollback.RESTART,
    replica_check_every: Annotated[
        int | None,
        typer.Option(
            envvar="GRADWATCH_REPLICA_CHECK_EVERY",
            metavar="N",
            min=0,
            help="Compare the ranks' parameters every N rounds; 0 for never.",
            show_default="100",
        ),
    ] = None,
    require_watch: Annotated[
        bool,
        typer.Option(
            "--require-watch",
            envvar="GRADWATCH_REQUIRE_WATCH",
            help="Exit with 2 unless every rank was watched.",
        ),
    ] = False,
    no_sidecar: Annotated[
        bool,
        typer.Option(
            "--no-sidecar",
            envvar="GRADWATCH_NO_SIDECAR",
            help="Start neither a sidecar nor a collector: `gradwatch sidecar` runs beside it, on the same "
            "--state-dir.",
        ),
    ] = False,
    autopsy: Annotated[
        bool,
        typer.Option(
            "--autopsy/--no-autopsy",
            envvar="GRADWATCH_AUTOPSY",
            help="Replay a bad micro-batch in a forked process, to name the operator in which it went bad.",
        ),
    ] = True,
    webhook: options.WebhookUrl = None,
    webhook_secret_file: options.WebhookSecretFile = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    identities: options.Identities = None,
    drain_timeout: options.DrainTimeout = 10.0,
    quiet: Annotated[
        bool, typer.Option("--quiet", envvar="GRADWATCH_QUIET", help="Say only verdicts and warnings.")
    ] = False,
) -> None:
    """Run a command and watch its gradients, without a change to its code.

    The exit code is the command's own; 127 when it is not found, 126 when it cannot be
    executed, 128+n when signal n ended it; 2 for wrong use. With --policy: 93 when the policy
    halts the job, which is then not to be started again; 75 when a rollback is due and whoever
    started this is to start it again. In CMD, {resume} stands for the checkpoint to resume.
    """
    if sys.platform != "linux":
        raise UsageError(
            f"run needs Linux, and this is {sys.platform}: start a collector and a sidecar by hand"
        )
    from gradwatch.cli import access
    from gradwatch.cli import webhook as webhooks
    from gradwatch.cli.launcher import environment, policy_file
    from gradwatch.cli.launcher.config import RunConfig
    from gradwatch.cli.launcher.launch import launch
    from gradwatch.cli.launcher.lifecycle import Rules

    source = context.get_parameter_source("job")
    if source is not None and source.name == "ENVIRONMENT" and environment.is_nested(os.environ):
        # An outer `gradwatch run` told its command which job that is; this is another one.
        job = None
    now = dt.datetime.now(dt.timezone.utc)
    name = job or environment.default_job(command, os.environ, now, secrets.token_hex(2))
    if job and environment.job_name(job) != job:
        raise UsageError(f"--job: {job!r} may hold letters, digits, '.', '_' and '-' only, 128 at most")
    if webhooks.read(webhook, webhook_secret_file) is not None and collector is not None:
        raise UsageError("--webhook: the collector that --collector names tells of incidents; give it there")
    raise typer.Exit(
        launch(
            RunConfig(
                command=tuple(command),
                job=name,
                state_dir=paths.state_dir(state_dir),
                collector=collector,
                http=http,
                webhook=webhook,
                webhook_secret_file=None if webhook_secret_file is None else webhook_secret_file.absolute(),
                access=access.of_client(ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file),
                identities=None if identities is None else identities.absolute(),
                policy=None if policy is None else policy_file.read(policy),
                rules=Rules(restarts=on_rollback is OnRollback.RESTART),
                report=None if report is None else report.absolute(),
                replica_check_every=replica_check_every,
                require_watch=require_watch,
                sidecar=not no_sidecar,
                autopsy=autopsy,
                drain_seconds=drain_timeout,
                quiet=quiet,
            )
        )
    )
