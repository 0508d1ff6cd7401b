"""`gradwatch token new`: a token for somebody, and what a collector keeps of it."""

import enum
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.cli.errors import UsageError

app = typer.Typer(help="Make tokens that a collector knows.", no_args_is_help=True)

_BITS = 256
# So that one that has strayed is recognised.
_PREFIX = "gw_"


class Role(str, enum.Enum):
    """What somebody is there for."""

    AGENT = "agent"
    VIEWER = "viewer"
    OPERATOR = "operator"


@app.command("new")
def new(
    *,
    name: Annotated[
        str,
        typer.Option(
            envvar="GRADWATCH_TOKEN_NAME", help="Whose it is; the audit trail calls an operator so."
        ),
    ],
    role: Annotated[
        Role,
        typer.Option(
            envvar="GRADWATCH_TOKEN_ROLE",
            help="An agent reports, a viewer reads, an operator reads and orders.",
        ),
    ],
    jobs: Annotated[
        list[str] | None,
        typer.Option(
            envvar="GRADWATCH_TOKEN_JOBS",
            metavar="PATTERN",
            help="Only jobs whose name is like this, such as 'llm-*'; may be given again.",
            show_default="all jobs",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            envvar="GRADWATCH_IDENTITIES",
            metavar="FILE",
            help="The identities file, to which it is added; made if absent.",
            show_default="none: the entry is printed",
        ),
    ] = None,
) -> None:
    """Make a token of 256 random bits, and print it: it is shown this once, and kept nowhere.

    A collector keeps its SHA-256. For so many random bits that is enough: there is nothing to guess, so
    nothing to slow down, as the hashes made for passwords do. It would not be enough for a word that a person
    has chosen.
    """
    from gradwatch.collector.access.admission import digest

    token = _PREFIX + secrets.token_urlsafe(_BITS // 8)
    entry = [
        f"- name: {name}",
        f"  role: {role.value}",
        f"  jobs: {json.dumps(jobs or ['*'])}",
        f"  token_sha256: {digest(token).hex()}",
    ]
    if file is None:
        _check(["identities:", *entry], "the new entry")
        typer.echo("\n".join(entry), err=True)
    else:
        _add(file, entry, name)
        typer.echo(f"gradwatch: {name} is added to {file}; a collector takes that up by itself", err=True)
    typer.echo(token)


def _add(file: Path, entry: list[str], name: str) -> None:
    """Add an entry at the end of a file; as it is then, it must be good."""
    file = file.resolve()
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file: cannot read {file}: {error}") from None
    if any(line.strip() and not line.strip().startswith("#") for line in lines):
        _check(lines, str(file))
    else:
        lines.append("identities:")
    first = next((line for line in lines if line.lstrip().startswith("- ")), "- ")
    indent = " " * (len(first) - len(first.lstrip()))
    whole = [*lines, *(indent + line for line in entry)]
    try:
        _check(whole, str(file))
    except UsageError as error:
        raise UsageError(
            f"{name} cannot be added at the end of {file}, which stays as it is: {error}"
        ) from None
    _write(file, "\n".join(whole) + "\n")


def _check(lines: list[str], what: str) -> None:
    from gradwatch.collector.access.identities_file import read_identities
    from gradwatch.collector.errors import AccessError

    try:
        read_identities("\n".join(lines).encode(), what)
    except AccessError as error:
        raise UsageError(str(error)) from None


def _write(file: Path, text: str) -> None:
    """Put a file in place of the one before, whole."""
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, prefix=f".{file.name}.", delete=False, encoding="utf-8"
        ) as scratch:
            scratch.write(text)
        os.chmod(scratch.name, mode)  # noqa: PTH101
        Path(scratch.name).replace(file)
    except OSError as error:
        raise UsageError(f"--file: cannot write {file}: {error.strerror}") from None
