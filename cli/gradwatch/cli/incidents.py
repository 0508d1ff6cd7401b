"""`gradwatch incidents`: the incidents a collector knows."""

from typing import Annotated

import typer

from gradwatch.cli import options


def incidents(
    job: Annotated[str | None, typer.Option(envvar="GRADWATCH_JOB", help="Only those of this job.")] = None,
    *,
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """List the incidents: who was first, where, and what has become of it."""
    from gradwatch.cli import output
    from gradwatch.cli.source import asked

    found = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file).incidents(job)
    if json:
        output.print_json(found)
        return
    rows = []
    for incident in found:
        first = incident["first"] or {}
        rows.append(
            [
                incident["id"],
                incident["job"],
                incident["status"],
                incident["cause"],
                incident["step"],
                first.get("rank"),
                first.get("node"),
                first.get("parameter"),
                incident["opened_at"],
                # A collector of an earlier version gives no title.
                incident.get("title"),
            ]
        )
    if not rows:
        typer.echo("no incidents" if job is None else f"no incidents of job {job}")
        return
    output.print_table(
        ["id", "job", "status", "cause", "step", "rank", "node", "parameter", "opened at", "what"], rows
    )
