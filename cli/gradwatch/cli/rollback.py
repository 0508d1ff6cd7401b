"""`gradwatch rollback JOB --to last-good`: an operator's word."""

import enum
import getpass
import platform
from typing import Annotated

import typer

from gradwatch.cli import options, paths
from gradwatch.cli.errors import UnavailableError


class To(str, enum.Enum):
    """Where to go back to."""

    LAST_GOOD = "last-good"


def rollback(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    *,
    to: Annotated[To, typer.Option(help="Where to go back to.")],
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """Stop a job that runs, and have it go on from its newest checkpoint that is known good."""
    del to  # there is one place so far
    from gradwatch.cli import output
    from gradwatch.cli.source import Api, asked

    source = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file)
    if not isinstance(source, Api):
        raise UnavailableError(
            f"no collector runs on {paths.state_dir(state_dir)}: the job does not run either"
        )
    decision = source.roll_back(job, _who())
    if json:
        output.print_json(decision)
        return
    typer.echo(f"decision {decision['id']}: {decision['effect']}; `gradwatch audit {job}` tells how it goes")


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "somebody"
    return f"{user} on {platform.node() or 'an unnamed host'}"
