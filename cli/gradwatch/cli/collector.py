"""`gradwatch collector`: receive what sidecars ship."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradwatch.cli import options, paths
from gradwatch.cli.errors import CliError, UsageError

if TYPE_CHECKING:
    from gradwatch.collector.statedir import CollectorInfo


def collector(
    *,
    state_dir: options.StateDir = None,
    grpc: Annotated[
        str | None,
        typer.Option(
            envvar="GRADWATCH_GRPC",
            metavar="HOST:PORT",
            help="Where sidecars report.",
            show_default="127.0.0.1:7700, or a free port",
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            envvar="GRADWATCH_HTTP",
            metavar="HOST:PORT",
            help="Where metrics and the API are served.",
            show_default="127.0.0.1:7701, or a free port",
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar="GRADWATCH_POLICY",
            metavar="FILE",
            help="The policy of all jobs that have none of their own here.",
            show_default="none",
        ),
    ] = None,
    max_series: Annotated[
        int,
        typer.Option(
            envvar="GRADWATCH_MAX_SERIES",
            min=100,
            metavar="N",
            help="At most so many series are told to Prometheus; jobs that run, and new ones, first.",
        ),
    ] = 2000,
    webhook: options.WebhookUrl = None,
    webhook_secret_file: options.WebhookSecretFile = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    http_tls_ca: options.HttpTlsCa = None,
    token_file: options.TokenFile = None,
    identities: options.Identities = None,
    on_ray: Annotated[
        bool,
        typer.Option(
            "--on-ray",
            envvar="GRADWATCH_ON_RAY",
            help="In the Ray cluster that this machine belongs to, as a detached actor.",
        ),
    ] = False,
    parent: options.Parent = None,
) -> None:
    """Receive, attribute, remember, and export metrics. One collector serves many jobs.

    Others than this machine are served only with --tls-cert, --tls-key, and --token-file or --identities.
    With --tls-ca, sidecars must show a certificate that this CA has signed; with --http-tls-ca, readers too.
    Certificates and identities that are renewed are taken up without a restart.

    With --on-ray it outlives this command, and Ray starts it again when its node dies: name a --state-dir on
    storage that all nodes see. Files that are named must be at the same path on every node.
    """
    import asyncio
    import logging
    import os

    # gRPC's own library would write a line at each handshake that fails, several times a second.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    from gradwatch.cli import access, policy_files
    from gradwatch.cli import parent as parent_watch
    from gradwatch.cli import webhook as webhooks
    from gradwatch.collector import errors
    from gradwatch.collector.access import Access
    from gradwatch.collector.app import CollectorConfig, serve

    if policy is not None:
        policy_files.check(policy)
    told = webhooks.read(webhook, webhook_secret_file)
    if on_ray:
        flags = {
            "--grpc": grpc,
            "--http": http,
            "--policy": policy,
            "--max-series": max_series,
            "--webhook": webhook,
            "--webhook-secret-file": webhook_secret_file,
            "--tls-cert": tls_cert,
            "--tls-key": tls_key,
            "--tls-ca": tls_ca,
            "--http-tls-ca": http_tls_ca,
            "--token-file": token_file,
            "--identities": identities,
        }
        _on_ray(paths.state_dir(state_dir), flags)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s gradwatch collector: %(message)s")
    config = CollectorConfig(
        state_dir=paths.state_dir(state_dir),
        grpc=grpc,
        http=http,
        policy=None if policy is None else policy.absolute(),
        max_series=max_series,
        webhook=told,
        access=Access(
            tls_cert,
            tls_key,
            tls_ca,
            token=access.token(token_file),
            identities=identities,
            http_client_ca=http_tls_ca,
        ),
    )

    async def run() -> None:
        stop = asyncio.Event()
        watching = asyncio.create_task(parent_watch.set_when_gone(parent, stop))
        try:
            await serve(config, on_ready=_say_where, stop=stop)
        finally:
            watching.cancel()

    try:
        asyncio.run(run())
    except (errors.AccessError, errors.BindError, errors.StateDirError) as error:
        raise UsageError(str(error)) from None
    except errors.CollectorError as error:
        raise CliError(str(error)) from None


def _on_ray(state_dir: Path, flags: dict[str, str | int | Path | None]) -> None:
    from gradwatch.cli import ray_collector

    given: list[object] = []
    for name, value in flags.items():
        if value is not None:
            given += [name, value.absolute() if isinstance(value, Path) else value]
    found = ray_collector.ensure(state_dir, given)
    typer.echo(
        f"gradwatch collector: runs in the Ray cluster; on its node metrics are at {found['http']}/metrics, "
        f"and its state in {found['state_dir']}",
        err=True,
    )


def _say_where(info: "CollectorInfo") -> None:
    typer.echo(f"gradwatch collector: metrics at {info.http}/metrics, reports to {info.grpc}", err=True)
