"""Looking at the values of tensors on disk: one read pass, in the order of the files, in bounded memory.

The files are mapped, a window at a time: summing what the file system has cached costs less than copying it
first. A file that is cut short meanwhile ends the process with SIGBUS, which `run` understands.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradwatch.agent.checkpoints import dcp
from gradwatch.agent.checkpoints.values import (
    FLOATING,
    Blobs,
    Extent,
    Inline,
    Leaf,
    Tensor,
    TornError,
    UnreadableError,
)
from gradwatch.agent.probe import scan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

WINDOW_BYTES = 32 << 20
# Looked at in one call: large enough that the bytes cost more than the call.
BLOCK_BYTES = 4 << 20
_COMPLEX_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


@dataclass(frozen=True)
class Run:
    """A run of bytes in which a tensor's elements lie.

    Attributes:
        extent: the bytes.
        dtype: of the elements.
        view: the tensor, if there may be gaps between its elements; None if there are none.
    """

    extent: Extent
    dtype: str
    view: Tensor | None


@dataclass
class Found:
    """The non-finite elements of one tensor so far."""

    count: int = 0
    nan: bool = False
    positive: bool = False
    negative: bool = False

    @property
    def value(self) -> str:
        """nan, +inf or -inf."""
        return "nan" if self.nan else "+inf" if self.positive else "-inf"

    def add(self, values: torch.Tensor) -> None:
        """Count the non-finite ones of `values`."""
        finite = torch.isfinite(values)
        bad = values[~finite]
        if bad.numel():
            self.count += bad.numel()
            self.nan |= bool(bad.isnan().any())
            self.positive |= bool((bad == math.inf).any())
            self.negative |= bool((bad == -math.inf).any())


def runs(leaf: Leaf) -> Iterator[Run]:
    """Where on disk a tensor's values lie; nothing for `Inline`.

    Raises:
        UnreadableError: it cannot be found out.
        OSError: a shard cannot be opened.
    """
    if isinstance(leaf, Tensor):
        begin, end = leaf.span()
        place = leaf.storage.extent
        if place is None:
            raise UnreadableError(f"storage {leaf.storage.key} is not in the file")
        if begin < end:
            extent = Extent(place.file, place.offset + begin, end - begin)
            dense = math.prod(leaf.size) * FLOATING[leaf.dtype] == end - begin
            yield Run(extent, leaf.dtype, None if dense else leaf)
    elif isinstance(leaf, Blobs):
        for part in dcp.parts(leaf):
            if not isinstance(part, Tensor):
                raise UnreadableError("a chunk that is not a tensor")
            if part.dtype in FLOATING:
                yield from runs(part)


def look_inline(leaf: Inline) -> Found:
    """Look at values that lie in the pickle."""
    found = Found()
    if leaf.data:
        values = scan.readable(torch.frombuffer(bytearray(leaf.data), dtype=_torch_dtype(leaf.dtype)))
        if values is not None and not scan.is_finite(values):
            found.add(values)
    return found


class Looker:
    """Reads runs and counts what in them is not finite.

    Attributes:
        read_bytes: looked at so far.
    """

    def __init__(self) -> None:
        self.read_bytes = 0
        self._file: Path | None = None
        self._descriptor = -1
        self._size = 0
        # Bytes [start, end) of the file.
        self._window: mmap.mmap | None = None
        self._start = self._end = 0
        # The file system was asked to read the bytes before this.
        self._asked = 0

    def close(self) -> None:
        """Close the file that is open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._file, self._descriptor, self._window = None, -1, None
        self._start = self._end = self._asked = 0

    def look(self, run: Run) -> Found:
        """Count the non-finite elements of a run. Neighbouring runs in the order of the file are read once.

        Raises:
            TornError: the file ends before the run does.
            OSError: it cannot be read.
        """
        found = Found()
        dtype = _torch_dtype(_COMPLEX_PARTS.get(run.dtype, run.dtype))
        for at, tensor in self._blocks(run.extent, dtype):
            if scan.is_finite(tensor):
                continue
            values = scan.readable(tensor)
            if values is not None:
                if run.view is not None:
                    values = values[_belong(run.view, at, values.numel(), dtype.itemsize)]
                found.add(values)
        return found

    def constant_but_infinite(self, tensor: Iterable[Run]) -> bool:
        """Whether all finite elements of a tensor are equal, as they are in an attention mask.

        Raises:
            UnreadableError, OSError: as `look`.
        """
        low, high = math.inf, -math.inf
        for run in tensor:
            for _, block in self._blocks(run.extent, _torch_dtype(_COMPLEX_PARTS.get(run.dtype, run.dtype))):
                values = scan.readable(block)
                finite = values[torch.isfinite(values)] if values is not None else block[:0]
                if finite.numel():
                    low, high = min(low, float(finite.min())), max(high, float(finite.max()))
                if low < high:
                    return False
        return True

    def first(self, run: Run) -> float:
        """The first element of a run.

        Raises:
            UnreadableError, OSError: as `look`.
        """
        dtype = _torch_dtype(run.dtype)
        small = Extent(run.extent.file, run.extent.offset, dtype.itemsize)
        return float(next(iter(self._blocks(small, dtype)))[1][0].item())

    def _blocks(self, extent: Extent, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """The elements in pieces, each with its byte offset in the run."""
        self._open(extent.file)
        position, end = extent.offset, extent.offset + extent.nbytes
        if end > self._size:
            raise TornError(f"{extent.file.name} ends at byte {self._size}, within a tensor")
        while position < end:
            if not (self._start <= position and position + dtype.itemsize <= self._end):
                self._map(position)
            count = min(self._end - position, end - position, BLOCK_BYTES) // dtype.itemsize
            window = self._window
            assert window is not None  # noqa: S101 - mapped above
            yield (
                position - extent.offset,
                torch.frombuffer(window, dtype=dtype, count=count, offset=position - self._start),
            )
            position += count * dtype.itemsize
            self.read_bytes += count * dtype.itemsize

    def _open(self, file: Path) -> None:
        if file != self._file:
            self.close()
            self._descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._file = file
            self._size = os.fstat(self._descriptor).st_size

    def _map(self, position: int) -> None:
        self._start = position - position % mmap.ALLOCATIONGRANULARITY
        self._end = min(self._start + WINDOW_BYTES, self._size)
        # Private and writable, since torch warns of memory that it might not write to.
        self._window = mmap.mmap(
            self._descriptor,
            self._end - self._start,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=self._start,
        )
        # Have the next one read meanwhile: page by page would be slow on a network's file system.
        # Asked for once: for what is cached already, the asking costs a tenth of the look.
        begin, end = max(self._start, self._asked), self._start + 2 * WINDOW_BYTES
        if begin < end:
            os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            self._asked = end


def merge(parts: Iterable[Found]) -> Found:
    """What was found in all parts of one tensor."""
    whole = Found()
    for part in parts:
        whole.count += part.count
        whole.nan |= part.nan
        whole.positive |= part.positive
        whole.negative |= part.negative
    return whole


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError(f"this torch has no {name}")
    return dtype


def _belong(view: Tensor, at: int, count: int, item: int) -> torch.Tensor:
    """Which of `count` elements from byte `at` of a view's span are the view's, gaps being not.

    Where the view visits elements in a way that has no unique answer, all are.
    """
    parts = FLOATING[view.dtype] // item
    places = torch.arange(at // item, at // item + count) // parts
    dimensions = sorted(
        (stride, size) for size, stride in zip(view.size, view.stride, strict=True) if size > 1 and stride
    )
    reach = 0
    for stride, size in dimensions:
        if stride <= reach:
            return torch.ones(count, dtype=torch.bool)
        reach += stride * (size - 1)
    belong = torch.ones(count, dtype=torch.bool)
    for stride, size in reversed(dimensions):
        index = places // stride
        belong &= index < size
        places = places - index * stride
    return belong & (places == 0)
