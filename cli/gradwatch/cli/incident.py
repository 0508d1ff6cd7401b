"""`gradwatch incident ID`: one incident, as a person would tell it."""

from typing import Annotated, Any

import typer

from gradwatch.cli import options


def incident(
    incident_id: Annotated[str, typer.Argument(metavar="ID", help="From `gradwatch incidents`.")],
    *,
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """Tell one incident: who was first and where, who was clean, what is not known."""
    from gradwatch.cli import output
    from gradwatch.cli.source import asked

    source = asked(url, state_dir, ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file)
    document = source.incident(incident_id)
    if json:
        output.print_json(document)
        return
    output.print_line(f"Incident {document['id']} of job {document['job']}: {_condition(document)}")
    output.print_line("")
    if document.get("title"):
        output.print_line(f"  {document['title']}")
        output.print_line("")
    for sentence in document["verdict"]:
        output.print_line(f"  {sentence}")
    if document["origins"]:
        output.print_line("")
        output.print_table(_COLUMNS, [_row(origin) for origin in document["origins"]])
    for missing in ((document["first"] or {}).get("replay") or {}).get("missing", []):
        output.print_line("")
        output.print_line(f"  Of the replay: {missing}.")
    for decision in document["decisions"]:
        output.print_line("")
        output.print_line(
            f"  Decided: {decision['action']} ({decision['outcome']}), since {decision['reason']}."
        )
        output.print_line(f"  Effect: {decision['effect']}.")
        if decision["concluded"]:
            output.print_line(f"  Came of it: {decision['concluded']}.")


_COLUMNS = ["rank", "node", "step", "round", "phase", "parameter", "value", "count", "position"]


def _row(origin: dict[str, Any]) -> list[object]:
    return [origin[column if column != "position" else "backward_position"] for column in _COLUMNS]


def _condition(document: dict[str, Any]) -> str:
    """Its status with the time that goes with it."""
    status = document["status"]
    at = document.get({"confirmed": "confirmed_at", "closed": "closed_at"}.get(status, "opened_at"))
    return f"{status}, {at}" if at else str(status)
