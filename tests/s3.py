"""An S3 service on loopback: moto's server, in a process of its own."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import s3fs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass(frozen=True)
class Bucket:
    """A bucket in it.

    Attributes:
        url: of the bucket.
        environ: what a process needs to reach it.
    """

    url: str
    environ: dict[str, str]

    @property
    def system(self) -> Any:
        """The fsspec file system."""
        return s3fs.S3FileSystem(
            key="key",
            secret="secret",
            endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def put(self, local: Path, name: str) -> str:
        """Upload a file or a folder; gives its URL."""
        self.system.put(str(local), f"{self.url}/{name}", recursive=local.is_dir())
        return f"{self.url}/{name}"


@contextlib.contextmanager
def s3_bucket(log: Path) -> Iterator[Bucket]:
    """A service with one bucket, as long as the context lasts.

    Args:
        log: a file for what the service says.
    """
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=said,
            stderr=said,
        )
        try:
            while (address := _ADDRESS.search(log.read_text())) is None:
                assert process.poll() is None, log.read_text()
            environ = {
                "AWS_ENDPOINT_URL": address[0],
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            bucket = Bucket("s3://bucket", environ)
            bucket.system.mkdir("bucket")
            yield bucket
        finally:
            process.terminate()
            process.wait()
