"""`gradwatch top JOB`: how a job goes, live."""

from typing import Annotated

import typer

from gradwatch.cli import options


def top(
    job: Annotated[str, typer.Argument(help="From `gradwatch jobs`.")],
    *,
    interval: Annotated[
        float,
        typer.Option(
            "--interval", envvar="GRADWATCH_INTERVAL", min=0.2, metavar="SECONDS", help="Between two looks."
        ),
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", envvar="GRADWATCH_ONCE", help="Look once, and print it.")
    ] = False,
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """Show a job as it goes: its incidents, and its ranks step by step, the worst first; Ctrl-C ends it.

    Where nobody looks at a terminal, and with --json, it looks once.
    """
    from rich.console import Console

    from gradwatch.cli import output
    from gradwatch.cli.source import asked
    from gradwatch.cli.top import live
    from gradwatch.cli.top.screen import screen

    source = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file)
    console = Console()
    if json:
        output.print_json({"job": source.job(job), "picture": source.picture(job)})
    elif once or not console.is_terminal:
        width, height = (console.width, console.height) if console.is_terminal else (_WIDTH, _HEIGHT)
        console.width = width
        console.print(screen(source.job(job), source.picture(job), width, height))
    else:
        live.show(source, job, console, interval)


# Of what a pipe is given.
_WIDTH, _HEIGHT = 120, 200
