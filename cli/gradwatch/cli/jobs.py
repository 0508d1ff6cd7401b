"""`gradwatch jobs`: the jobs a collector knows."""

import typer

from gradwatch.cli import options


def jobs(
    *,
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """List the jobs."""
    from gradwatch.cli import output
    from gradwatch.cli.source import asked

    found = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file).jobs()
    if json:
        output.print_json(found)
        return
    if not found:
        typer.echo("no job has reported yet")
        return
    rows = [
        [
            job["job"],
            job["status"],
            f"{job['ranks_watched']} of {'?' if job['world_size'] is None else job['world_size']}",
            job["step"],
            len(job["incidents"]) + job["incidents_left_out"],
            job["last_seen"],
        ]
        for job in found
    ]
    output.print_table(["job", "status", "ranks watched", "step", "incidents", "last seen"], rows)
