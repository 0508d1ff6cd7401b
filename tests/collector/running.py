"""A whole collector in this process, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import httpx

from gradwatch.collector.app import CollectorConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

    from gradwatch.collector import statedir

ANY = "127.0.0.1:0"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def config(tmp_path: Path, **changes: Any) -> CollectorConfig:
    return CollectorConfig(**{"state_dir": tmp_path / "state", "grpc": ANY, "http": ANY, **changes})


@contextlib.asynccontextmanager
async def http(info: statedir.CollectorInfo) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=info.http, trust_env=False) as client:
        yield client
