"""`gradwatch sidecar`: ship a spool to a collector."""

from pathlib import Path
from typing import Annotated

import typer

from gradwatch.agent.checkpoints.result import Layout
from gradwatch.cli import options, paths
from gradwatch.cli.errors import CliError, UsageError


def sidecar(
    *,
    spool: Annotated[
        Path | None,
        typer.Option(
            envvar="GRADWATCH_SPOOL",
            metavar="DIR",
            help="The folder that the probes write.",
            show_default="one run of --state-dir after another",
        ),
    ] = None,
    collector: options.Collector = None,
    state_dir: options.StateDir = None,
    job: Annotated[
        str | None,
        typer.Option(
            envvar="GRADWATCH_JOB", help="Keep this job's status in the spool.", show_default="none"
        ),
    ] = None,
    drain_timeout: options.DrainTimeout = 10.0,
    drain: Annotated[
        bool,
        typer.Option("--drain", envvar="GRADWATCH_DRAIN", help="Ship what is there, then end."),
    ] = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    checkpoints_root: Annotated[
        str | None,
        typer.Option(
            envvar="GRADWATCH_CHECKPOINTS_ROOT",
            metavar="DIR|URL",
            help="Look after the checkpoints below it: checkpoints.root of the job's policy. Wants torch.",
        ),
    ] = None,
    checkpoints_layout: Annotated[
        Layout, typer.Option(envvar="GRADWATCH_CHECKPOINTS_LAYOUT", help="How they lie there.")
    ] = Layout.AUTO,
    parent: options.Parent = None,
) -> None:
    """Ship the journals of one node to a collector. `gradwatch run` starts one by itself.

    Without --spool it waits for a `gradwatch run --no-sidecar` on the same --state-dir, such as in another
    container of the Pod, serves it, and waits for the next. It also ships what earlier runs have left there.
    On SIGTERM it ships the rest, then ends: with 0 when the collector has everything, else with 1.
    """
    import asyncio
    import logging
    import os

    # gRPC's own library would write a line at each handshake that fails, several times a second.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

    from gradwatch.agent.checkpoints.place import place_of
    from gradwatch.agent.sidecar.app import SidecarConfig, SpoolTakenError, serve
    from gradwatch.agent.sidecar.attend import attend
    from gradwatch.cli import access

    shown = access.of_client(ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file)
    if collector is not None:
        access.check_collector(collector, shown)
    if spool is not None and not spool.is_dir():
        raise UsageError(f"--spool: {spool} is not a folder")
    folder = paths.state_dir(state_dir)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s gradwatch sidecar: %(message)s")
    config = SidecarConfig(
        spool=folder / "spool" if spool is None else spool.absolute(),
        state_dir=folder,
        collector=collector,
        job=job,
        drain_seconds=drain_timeout,
        parent=parent,
        drain=drain,
        access=shown,
        checkpoints=None if checkpoints_root is None else place_of(checkpoints_root),
        checkpoints_layout=checkpoints_layout,
    )
    try:
        complete = asyncio.run(attend(config) if spool is None else serve(config))
    except SpoolTakenError as error:
        raise UsageError(f"{error}; one is enough") from None
    except OSError as error:
        raise CliError(f"cannot use the spool {config.spool}: {error}") from None
    raise typer.Exit(0 if complete else 1)
