"""Where checkpoints lie, as the policy declares it: a folder, or a URL of remote storage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from gradwatch.agent.checkpoints import listing, remote
from gradwatch.agent.checkpoints.listing import Listing


class Place(Protocol):
    """A root.

    Attributes:
        poll_seconds: how often it is worth a look.
    """

    poll_seconds: float

    def __str__(self) -> str:
        """As it was declared."""
        ...

    def take(self) -> Listing:
        """List all that lies there; a file by itself is ".".

        Raises:
            OSError: it cannot be read.
        """
        ...

    def check(self) -> None:
        """Find out whether it can be read.

        Raises:
            OSError: it cannot.
        """
        ...

    def address(self, path: str) -> str:
        """What is told of a path relative to it, and where a scan finds it."""
        ...

    def holds(self, path: str) -> bool:
        """Whether a path relative to it does not lead out of it."""
        ...


class Folder:
    """A folder of a file system.

    Args:
        root: absolute.
    """

    poll_seconds = 2.0

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def take(self) -> Listing:
        """See `Place`."""
        if not self.root.is_file():
            return listing.take(self.root)
        return Listing({".": listing.take(self.root.parent, at=self.root.name).files[self.root.name]})

    def check(self) -> None:
        """See `Place`."""
        os.scandir(self.root).close()

    def address(self, path: str) -> str:
        """See `Place`."""
        return str(self.root / path)

    def holds(self, path: str) -> bool:
        """See `Place`. A folder that has become a link since it was listed could lead anywhere."""
        return listing.inside(self.root, path) == path


class Remote:
    """Remote storage.

    Args:
        url: of what would be the folder.
    """

    # Each look is a request that somebody pays for.
    poll_seconds = 10.0

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def take(self) -> Listing:
        """See `Place`."""
        return remote.take(self._url)

    def check(self) -> None:
        """See `Place`."""
        remote.take(self._url)

    def address(self, path: str) -> str:
        """See `Place`."""
        return self._url if path == "." else f"{self._url}/{path}"

    def holds(self, path: str) -> bool:
        """See `Place`."""
        return ".." not in path.split("/")


def place_of(root: str) -> Folder | Remote:
    """The place that is declared so: a URL, or else a path, which is taken from the working folder."""
    return Remote(root) if remote.is_url(root) else Folder(Path(root).absolute())
