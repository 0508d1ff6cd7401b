"""The port of a process group: nobody else takes it before the ranks have come."""

from __future__ import annotations

import datetime as dt
import socket

import pytest
import torch.distributed as dist

from tests import ranks


def test_a_port_is_the_store_s_and_nobody_else_s(monkeypatch):
    ports: list[int] = []
    monkeypatch.setattr(
        ranks.subprocess, "Popen", lambda *_, env, **__: ports.append(int(env["MASTER_PORT"]))
    )
    ranks.start_ranks("none", 2)
    first, second = ports
    assert first == second
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", first))
    with socket.socket() as other:
        # As with a port that is asked for by another test, or that an outgoing connection is given.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        assert other.getsockname()[1] != first
    store = dist.TCPStore("127.0.0.1", first, 1, is_master=True, timeout=dt.timedelta(seconds=20))
    store.set("key", "value")
    assert store.get("key") == b"value"
