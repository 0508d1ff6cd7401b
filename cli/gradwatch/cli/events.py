"""`gradwatch events JOB`: what was reported of a job, in order of arrival."""

from typing import Annotated, Any

import typer

from gradwatch.cli import options


def events(
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
    """List what the processes of a job reported; with --json one record a line."""
    from gradwatch.cli import output
    from gradwatch.cli.source import asked

    found = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file).events(job)
    if json:
        output.print_json_lines(found)
        return
    rows = [
        [event["received_at"], event["attempt"], event["rank"], event["kind"], _summary(event)]
        for event in found
    ]
    output.print_table(["received at", "attempt", "rank", "kind", ""], rows)


def _summary(event: dict[str, Any]) -> str:
    """The fields of a record that tell something in one line."""
    body = event["body"]
    plain = {name: value for name, value in body.items() if isinstance(value, (str, int, float, bool))}
    gradients = body.get("gradients")
    if gradients:
        plain["parameter"] = gradients[0]["parameter"]
        plain["value"] = gradients[0]["value"]
    return " ".join(f"{name}={value}" for name, value in plain.items() if value != "")
