"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="GRADWATCH_STATE_DIR",
        help="Where spools and the collector's data lie.",
        show_default="~/.local/state/gradwatch",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="GRADWATCH_URL",
        metavar="URL",
        help="A collector's HTTP address, such as http://127.0.0.1:7701.",
        show_default="the collector of --state-dir",
    ),
]
Json = Annotated[bool, typer.Option("--json", envvar="GRADWATCH_JSON", help="Print JSON.")]
Parent = Annotated[
    int | None,
    typer.Option("--parent", envvar="GRADWATCH_PARENT", hidden=True, help="End when this process has gone."),
]
DrainTimeout = Annotated[
    float,
    typer.Option(
        "--drain-timeout",
        envvar="GRADWATCH_DRAIN_TIMEOUT",
        min=0.0,
        metavar="SECONDS",
        help="How long to go on shipping at the end.",
    ),
]
Collector = Annotated[
    str | None,
    typer.Option(
        "--collector",
        envvar="GRADWATCH_COLLECTOR",
        metavar="HOST:PORT",
        help="The gRPC address of a collector.",
        show_default="one on --state-dir",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        envvar="GRADWATCH_TLS_CERT",
        metavar="FILE",
        help="This side's certificate, PEM.",
        show_default="none",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(
        "--tls-key",
        envvar="GRADWATCH_TLS_KEY",
        metavar="FILE",
        help="Its private key, PEM.",
        show_default="none",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        envvar="GRADWATCH_TLS_CA",
        metavar="FILE",
        help="The CA that signs the other side's certificate, PEM.",
        show_default="none",
    ),
]
WebhookUrl = Annotated[
    str | None,
    typer.Option(
        "--webhook",
        envvar="GRADWATCH_WEBHOOK",
        metavar="URL",
        help="Is told of each confirmed incident, once, by a signed POST.",
        show_default="none",
    ),
]
WebhookSecretFile = Annotated[
    Path | None,
    typer.Option(
        "--webhook-secret-file",
        envvar="GRADWATCH_WEBHOOK_SECRET_FILE",
        metavar="FILE",
        help="The secret that signs what --webhook is told: base64 of 24 to 64 bytes.",
        show_default="none",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="GRADWATCH_TOKEN_FILE",
        metavar="FILE",
        help="The token to show; a collector's own may do everything.",
        show_default="none",
    ),
]
Identities = Annotated[
    Path | None,
    typer.Option(
        "--identities",
        envvar="GRADWATCH_IDENTITIES",
        metavar="FILE",
        help="Who may report, read and order, for which jobs; see `gradwatch token new`.",
        show_default="none",
    ),
]
HttpTlsCa = Annotated[
    Path | None,
    typer.Option(
        "--http-tls-ca",
        envvar="GRADWATCH_HTTP_TLS_CA",
        metavar="FILE",
        help="HTTPS clients must show a certificate that this CA has signed, PEM.",
        show_default="none",
    ),
]
