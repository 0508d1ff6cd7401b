"""The webhook as a command is given it: looked at before anything starts."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gradwatch.cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from gradwatch.collector.notify.webhook import Webhook


def read(url: str | None, secret_file: Path | None) -> Webhook | None:
    """Whom to tell; None for nobody.

    Raises:
        UsageError: the URL or the file is of no use. Says nothing of what is in them.
    """
    if url is None:
        if secret_file is not None:
            raise UsageError("--webhook-secret-file signs what a webhook is told: give --webhook too")
        return None
    if secret_file is None:
        raise UsageError(
            "--webhook wants --webhook-secret-file, so that its receiver can tell who speaks: "
            "`openssl rand -base64 32 > secret` makes one"
        )
    from gradwatch.collector.notify.message import read_secret
    from gradwatch.collector.notify.webhook import Webhook

    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError("--webhook: give an http:// or https:// URL")
    try:
        return Webhook(url, read_secret(secret_file.read_text()))
    except OSError as error:
        raise UsageError(f"--webhook-secret-file: cannot read {secret_file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--webhook-secret-file {secret_file}: {error}") from None
