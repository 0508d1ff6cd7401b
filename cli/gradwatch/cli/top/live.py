"""Keep a screen up to date until somebody presses Ctrl-C."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from rich.live import Live
from rich.text import Text

from gradwatch.cli.errors import UnavailableError
from gradwatch.cli.top.screen import screen

if TYPE_CHECKING:
    from rich.console import Console

    from gradwatch.cli.source import Source


def show(source: Source, job: str, console: Console, interval: float) -> None:
    """Look every `interval` seconds. A collector that goes away is said, and waited for.

    Raises:
        UnavailableError: there was nothing to show to begin with.
    """
    shown = screen(source.job(job), source.picture(job), console.width, console.height)
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(interval)
                try:
                    document, picture = source.job(job), source.picture(job)
                except UnavailableError as error:
                    live.update(Text(f"{error}\n\ntrying again; Ctrl-C ends this"), refresh=True)
                    continue
                live.update(screen(document, picture, console.width, console.height), refresh=True)
