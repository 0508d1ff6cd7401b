"""Somebody whom a webhook reaches, and who answers as they are told to."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Receiver:
    """What came in.

    Attributes:
        answers: statuses, one for each message; 204 once there are no more.
        got: headers and body of each.
        event: set when something came in.
    """

    url: str = ""
    answers: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    event: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def receiver(*answers: int) -> Iterator[Receiver]:
    it = Receiver(answers=list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            it.got.append(({key.lower(): value for key, value in self.headers.items()}, content))
            self.send_response(it.answers.pop(0) if it.answers else 204)
            self.end_headers()
            it.event.set()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.url = f"http://127.0.0.1:{server.server_address[1]}/hook-secret-path"
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield it
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
