"""How the reading commands print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from gradwatch.cli.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def print_json(document: Any) -> None:
    """Print a document for a program."""
    typer.echo(json.dumps(document, indent=2))


def print_json_lines(documents: Iterable[Any]) -> None:
    """Print documents for a program, one a line."""
    for document in documents:
        typer.echo(json.dumps(document))


def print_line(text: str) -> None:
    """Print a line for a person."""
    typer.echo(printable(text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table for a person; what is not known shows as a dash."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else printable(str(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:
        # A pipe has no width; wrapping would cut what grep looks for.
        console = Console(width=1 << 12)
    console.print(table)
