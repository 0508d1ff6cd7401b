"""`gradwatch audit JOB`: what was decided about a job, and what was done."""

from typing import Annotated

import typer

from gradwatch.cli import options


def audit(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    *,
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """List what was decided about a job, what was done and why; with --json one line each."""
    from gradwatch.cli import output
    from gradwatch.cli.source import asked

    source = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file)
    found = source.audit(job)
    if json:
        output.print_json_lines(found)
        return
    rows = [[line["at"], line["what"], line["about"], line["text"]] for line in found]
    output.print_table(["at", "what", "decision", ""], rows)
