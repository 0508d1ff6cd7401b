"""The reference of the commands, by typer itself from what their `--help` is made of."""

from __future__ import annotations

import subprocess
import sys


def page() -> str:
    """The whole page, in Markdown."""
    made = subprocess.run(
        [
            *(sys.executable, "-m", "typer", "gradwatch.cli.main", "utils", "docs"),
            *("--name", "gradwatch", "--title", "Commands"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    head, _, rest = made.partition("\n\n")
    note = (
        "Made from the code by `python -m scripts.reference`. Every flag has its variable, and every\n"
        "command that reads has `--json`. What `gradwatch run` does with a command is in [gradwatch run](run.md)."
    )
    # At the end are blank lines, of which editors leave one.
    return f"{head}\n\n{note}\n\n{rest.strip()}\n"
