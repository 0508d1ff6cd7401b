"""Certificates and tokens as files, made anew for each test run."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "0123456789abcdef-of-the-tests"


@dataclass(frozen=True)
class Files:
    """One CA with what it has signed, another CA with what that has signed, and tokens.

    Attributes:
        ca: signed all but `other_cert`.
        cert: names localhost, 127.0.0.1 and ::1.
        renewed_cert: the same.
        client_cert: names nobody whom a collector knows.
        trainer_cert: its alternative name is trainer.example.
        wallboard_cert: its common name is wallboard.
        expired_cert: as `trainer_cert`, until yesterday.
        elsewhere_cert: names another host.
        other_ca: signed `other_cert`, which names the same hosts as `cert`.
    """

    folder: Path

    def __getattr__(self, name: str) -> Path:
        path = self.folder / f"{name}.pem"
        assert path.exists(), name
        return path

    @property
    def token(self) -> Path:
        return self.folder / "token"

    @property
    def other_token(self) -> Path:
        return self.folder / "other-token"


def make(folder: Path) -> Files:
    """Make all of them."""
    here = ("localhost", "127.0.0.1", "::1")
    ca, other = trustme.CA(), trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other_ca.pem")
    now = dt.datetime.now(dt.timezone.utc)
    past = {"not_before": now - dt.timedelta(days=9), "not_after": now - dt.timedelta(days=1)}
    for name, signer, hosts, more in (
        ("", ca, here, {}),
        ("renewed_", ca, here, {}),
        ("client_", ca, ("a-sidecar.example",), {}),
        ("trainer_", ca, ("trainer.example",), {}),
        ("wallboard_", ca, ("10.0.0.9",), {"common_name": "wallboard"}),
        ("expired_", ca, ("trainer.example",), past),
        ("elsewhere_", ca, ("elsewhere.example",), {}),
        ("other_", other, here, {}),
    ):
        made = signer.issue_cert(*hosts, **more)
        made.cert_chain_pems[0].write_to_path(folder / f"{name}cert.pem")
        made.private_key_pem.write_to_path(folder / f"{name}key.pem")
    files = Files(folder)
    files.token.write_text(f"\n {TOKEN}\n")
    files.other_token.write_text("another token, blanks replaced".replace(" ", "-"))
    for path in (files.token, files.other_token):
        path.chmod(0o600)
    return files
