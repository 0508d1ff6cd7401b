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
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_ca: options.TlsCa = None,
    token_file: options.TokenFile = None,
    parent: options.Parent = None,
) -> None:
    """Receive, attribute, remember, and export metrics. One collector serves many jobs.

    Others than this machine are served only with --tls-cert, --tls-key and --token-file. With --tls-ca,
    sidecars must show a certificate that this CA has signed.
    """
    import asyncio
    import logging
    import os

    # gRPC's own library would write a line at each handshake that fails, several times a second.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    from gradwatch.cli import access, policy_files
    from gradwatch.cli import parent as parent_watch
    from gradwatch.collector import errors
    from gradwatch.collector.access import Access
    from gradwatch.collector.app import CollectorConfig, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s gradwatch collector: %(message)s")
    if policy is not None:
        policy_files.check(policy)
    config = CollectorConfig(
        state_dir=paths.state_dir(state_dir),
        grpc=grpc,
        http=http,
        policy=None if policy is None else policy.absolute(),
        access=Access(tls_cert, tls_key, tls_ca, access.token(token_file)),
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


def _say_where(info: "CollectorInfo") -> None:
    typer.echo(f"gradwatch collector: metrics at {info.http}/metrics, reports to {info.grpc}", err=True)
