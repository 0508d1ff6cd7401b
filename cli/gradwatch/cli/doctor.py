"""`gradwatch doctor`: would a run be watched here?"""

from gradwatch.cli import options, paths


def doctor(
    *,
    url: options.Url = None,
    state_dir: options.StateDir = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    token_file: options.TokenFile = None,
    json: options.Json = False,
) -> None:
    """Check what a watched run needs, in the Python that runs this command.

    Exits with 1 when something is wrong.
    """
    import typer

    from gradwatch.cli import access, checks, output

    shown = access.of_reader(ca=tls_ca, cert=tls_cert, key=tls_key, token_file=token_file)
    found = checks.all_checks(url, paths.state_dir(state_dir), shown)
    healthy = all(check.ok for check in found)
    if json:
        rows = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in found]
        output.print_json({"ok": healthy, "checks": rows})
    else:
        output.print_table(
            ["check", "", "detail"],
            [[check.name, "ok" if check.ok else "WRONG", check.detail] for check in found],
        )
    raise typer.Exit(0 if healthy else 1)
