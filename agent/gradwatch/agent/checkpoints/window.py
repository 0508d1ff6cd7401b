"""Parts of files, read as files."""

from __future__ import annotations

import io
from typing import IO

from gradwatch.agent.checkpoints.values import Extent, TornError


class Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], extent: Extent) -> None:
        self.file = file
        self.extent = extent
        self._position = 0

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether it has positions."""
        return True

    def tell(self) -> int:
        """Position in the window."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; raises OSError before the beginning, as files do."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.extent.nbytes}[whence]
        if base + offset < 0:
            raise OSError("a position before the beginning")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, all that are left by default."""
        left = max(0, self.extent.nbytes - self._position)
        count = left if size < 0 else min(size, left)
        self.file.seek(self.extent.offset + self._position)
        data = self.file.read(count)
        self._position += len(data)
        return data

    def readline(self, size: int | None = -1) -> bytes:
        """Read up to and with the next newline."""
        left = max(0, self.extent.nbytes - self._position)
        self.file.seek(self.extent.offset + self._position)
        data = self.file.readline(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def part(self, offset: int, nbytes: int) -> Extent:
        """Bytes of the window as bytes of its file.

        Raises:
            TornError: it has no such bytes.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.extent.nbytes:
            raise TornError(
                f"bytes {offset} to {offset + nbytes} are said to be in a file of {self.extent.nbytes}"
            )
        return Extent(self.extent.file, self.extent.offset + offset, nbytes)
