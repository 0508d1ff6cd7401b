"""The collector as a process: `serve(CollectorConfig(...))`."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import logging
import os
import signal
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import uvicorn

from gradwatch.collector import statedir
from gradwatch.collector.access.config import Access
from gradwatch.collector.access.door import Door
from gradwatch.collector.access.http_gate import MAX_HEADER_BYTES, HttpGate, HttpProtocol
from gradwatch.collector.api import new_app
from gradwatch.collector.board import Board
from gradwatch.collector.engine import Engine
from gradwatch.collector.errors import BindError, NotLoopbackError, PortTakenError, StateDirError
from gradwatch.collector.metrics.exposition import MAX_SERIES
from gradwatch.collector.model import FoldConfig
from gradwatch.collector.notify.webhook import Notifier, Webhook
from gradwatch.collector.policies import PolicyBook
from gradwatch.collector.service import GrpcServer
from gradwatch.collector.statedir import CollectorInfo, default_state_dir
from gradwatch.collector.store import Store
from gradwatch.collector.version import collector_version

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from starlette.types import ASGIApp

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

DEFAULT_GRPC = "127.0.0.1:7700"
DEFAULT_HTTP = "127.0.0.1:7701"


@dataclass(frozen=True)
class CollectorConfig:
    """How a collector is to run.

    Attributes:
        state_dir: where it remembers; made if absent.
        grpc: HOST:PORT; None for the default, or a free port when that is taken. Port 0 is any free one.
        http: the same for HTTP.
        confirm_timeout: seconds of silence after which a rank is named unknown.
        policy: the policy file of jobs that have none of their own in the state directory.
        max_series: at most so many series are told to Prometheus.
        webhook: told of each confirmed incident; None for nobody.
        access: certificates, token and identities. TLS is spoken on the addresses that are given here; a
            default one, which only this machine reaches, stays plain.
    """

    state_dir: Path = field(default_factory=default_state_dir)
    grpc: str | None = None
    http: str | None = None
    confirm_timeout: float = 30.0
    policy: Path | None = None
    max_series: int = MAX_SERIES
    webhook: Webhook | None = None
    access: Access = field(default_factory=Access)


async def serve(
    config: CollectorConfig,
    *,
    on_ready: Callable[[CollectorInfo], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a collector until SIGTERM, SIGINT or `stop`.

    Args:
        config: how.
        on_ready: called once it listens, with where.
        stop: ends it when set.

    Raises:
        AccessError: a certificate or the identities file is of no use. Nothing was started.
        BindError: an address cannot be bound. Nothing was started.
        StateDirInUseError: another collector holds the state directory. Nothing was started.
        StateDirError: the state directory cannot be used. Nothing was started.
        StoreError: what it remembers cannot be read.
    """
    stop = stop or asyncio.Event()
    with _stopping_on_signals(stop):
        async with running(config) as info:
            if on_ready is not None:
                on_ready(info)
            await stop.wait()
            _log.info("stopping")


@contextlib.asynccontextmanager
async def running(config: CollectorConfig) -> AsyncIterator[CollectorInfo]:
    """A collector that runs within the block; raises as `serve` does."""
    async with contextlib.AsyncExitStack() as stack:
        grpc_address = _Address.parse(config.grpc or DEFAULT_GRPC)
        http_address = _Address.parse(config.http or DEFAULT_HTTP)
        for address in (grpc_address, http_address):
            address.must_be_safe(config.access)
        door = Door(config.access)
        grpc_tls = config.grpc is not None and door.certificates is not None
        http_tls = None if config.http is None else door.tls()
        _make(config.state_dir)
        stack.enter_context(statedir.held(config.state_dir))
        statedir.remove_info(config.state_dir)
        engine = Engine(
            Store.in_file(config.state_dir / statedir.DATABASE),
            FoldConfig(confirm_timeout=config.confirm_timeout),
            PolicyBook(config.state_dir, config.policy),
        )
        board = Board(engine)
        notifier = None if config.webhook is None else Notifier(engine, config.webhook)
        identity = statedir.identity(config.state_dir)
        grpc_server = GrpcServer(engine, board, door, identity)
        # Lets go of the port if what follows fails.
        stack.push_async_callback(grpc_server.stop)
        grpc_port = _with_fallback(
            grpc_address, config.grpc is not None, lambda text: grpc_server.bind(text, tls=grpc_tls)
        )
        http_socket = _with_fallback(http_address, config.http is not None, _listen)
        stack.callback(http_socket.close)
        scheme = "http" if http_tls is None else "https"
        http_url = f"{scheme}://{http_address.to_connect(http_socket.getsockname()[1])}"

        await stack.enter_async_context(engine.running())
        await stack.enter_async_context(board.running())
        await stack.enter_async_context(door.watching())
        if notifier is not None:
            await stack.enter_async_context(notifier.running())
        app = HttpGate(new_app(engine, door, notifier, config.max_series), door)
        await stack.enter_async_context(_serving_http(app, http_socket, http_tls))
        await grpc_server.start(http_url)
        stack.push_async_callback(grpc_server.stop)
        info = CollectorInfo(
            pid=os.getpid(),
            grpc=str(grpc_address.to_connect(grpc_port)),
            grpc_tls=grpc_tls,
            http=http_url,
            started_at=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
            version=collector_version(),
            id=identity,
        )
        statedir.write_info(config.state_dir, info)
        stack.callback(statedir.remove_info, config.state_dir)
        _log.info("collecting on %s; %s; state in %s", info.grpc, info.http, config.state_dir)
        yield info


# ---------------------------------------------------------------- addresses


@dataclass(frozen=True)
class _Address:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> _Address:
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdecimal() or int(port) > 65535:  # noqa: PLR2004
            raise BindError(f"{text!r} is not an address: give HOST:PORT, such as 127.0.0.1:7700")
        return cls(host, int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def to_connect(self, port: int) -> _Address:
        """Where someone on this machine reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return _Address(host, port)

    def must_be_safe(self, access: Access) -> None:
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise BindError(f"cannot resolve {self.host}: {error.strerror}") from error
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        if access.missing and not all(address.is_loopback for address in addresses):
            raise NotLoopbackError(
                f"refusing to listen on {self}: others could reach it, which needs TLS and a token. "
                f"Give {', '.join(access.missing)} too, or a loopback address such as 127.0.0.1"
            )


def _with_fallback(address: _Address, explicit: bool, bind: Callable[[str], _T]) -> _T:
    """Bind the address; a default one that is taken gives way to a free port."""
    try:
        return bind(str(address))
    except PortTakenError:
        if explicit:
            raise
        return bind(str(_Address(address.host, 0)))


def _listen(address: str) -> socket.socket:
    parsed = _Address.parse(address)
    family = socket.AF_INET6 if ":" in parsed.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((parsed.host, parsed.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise PortTakenError(
            f"cannot listen for HTTP on {address}: {error.strerror}; free the port or choose another"
        ) from error
    return listener


# ---------------------------------------------------------------- parts


class _HttpServer(uvicorn.Server):
    """uvicorn, which leaves signals to us, and says when it has started."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@contextlib.asynccontextmanager
async def _serving_http(
    app: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None
) -> AsyncIterator[None]:
    settings = uvicorn.Config(
        app,
        http=HttpProtocol,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    settings.load()
    settings.ssl = tls
    server = _HttpServer(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    listening = asyncio.create_task(server.listening.wait())
    try:
        await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        yield
    finally:
        listening.cancel()
        server.should_exit = True
        await serving


def _make(state_dir: Path) -> None:
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateDirError(
            f"cannot make the state directory {state_dir}: {error.strerror}; give another --state-dir"
        ) from error


@contextlib.contextmanager
def _stopping_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """Stop on SIGTERM and SIGINT, however often they come; not where signals are another's business."""
    loop = asyncio.get_running_loop()
    taken = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            loop.add_signal_handler(number, stop.set)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
