"""Sharded parameters: the ranks of one host hand their shards over for a replay, which needs them whole."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.autopsy.shelf import close

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path
    from typing import IO

    from gradwatch.agent.probe.autopsy.shelf import Shelf
    from gradwatch.agent.probe.fsdp_shards import Shards

# That a rank waits for the shards of others, or for whoever has asked for its own.
SECONDS = 5.0


class NoShardsError(Exception):
    """The shards of other ranks are not to be had, for this reason."""


class Handover:
    """One rank's part in it.

    Args:
        shelf: of its host.
        folder: the spool of the run.
        rank: its own.
    """

    def __init__(self, shelf: Shelf, folder: Path, rank: int) -> None:
        self._shelf = shelf
        self._folder = folder
        self._rank = rank

    def ask(self, name: tuple[int, int], shards: Shards) -> None:
        """Have the other ranks lay theirs down, once they have seen the reduction of the round."""
        # When it fails, they do not come, which is said then.
        with suppress(OSError):
            self._shelf.ask(name, self._rank, shards.ranks)

    def call_off(self, name: tuple[int, int]) -> None:
        """They are not needed after all."""
        with suppress(OSError):
            self._shelf.opened(name)

    def lay_down(self, name: tuple[int, int], shards: Shards) -> int | None:
        """Lay this rank's shards down if another one has asked for them in this round.

        Returns:
            Who has; None when nobody has.

        Raises:
            OSError: they cannot be written, and whoever has asked sees that they do not come.
        """
        asker = self._shelf.asked(name, shards.ranks)
        if asker is not None:
            self._shelf.put_shards(name, self._rank, shards.held())
        return asker

    def wait_until_opened(self, name: tuple[int, int]) -> None:
        """Wait until whoever has asked for shards needs them no more: the process may end."""
        self._shelf.wait_until_opened(name, SECONDS)

    @contextmanager
    def own(self, name: tuple[int, int], shards: Shards) -> Iterator[Mapping[int, IO[bytes]]]:
        """What the rank that has asked for them needs to make its parameters whole, by rank.

        Raises:
            NoShardsError: they are not to be had.
        """
        try:
            try:
                self._shelf.put_shards(name, self._rank, shards.held())
                files = self._open(name, shards.peers)
            finally:
                self._shelf.opened(name)
        except OSError as error:
            raise NoShardsError(f"the parameters could not be handed over: {error}") from error
        try:
            yield files
        finally:
            close(files)

    @contextmanager
    def others(self, name: tuple[int, int], shards: Shards, asker: int) -> Iterator[Mapping[int, IO[bytes]]]:
        """What another rank needs to make its own parameters whole, once the asker has laid all down.

        Raises:
            NoShardsError: they are not to be had.
            OSError: they cannot be read.
        """
        files = self._open(name, {*shards.peers, asker})
        try:
            yield {rank: files[rank] for rank in shards.peers}
        finally:
            close(files)

    def _open(self, name: tuple[int, int], ranks: Collection[int]) -> Mapping[int, IO[bytes]]:
        elsewhere = [
            rank for rank in sorted(ranks) if not (self._folder / spool.claim_filename(rank)).exists()
        ]
        if elsewhere:
            raise NoShardsError(
                "parts of the parameters are on other hosts, which they do not leave: those of "
                f"{_named(elsewhere)}"
            )
        files = self._shelf.open_shards(name, ranks, SECONDS)
        if files is None:
            raise NoShardsError(
                f"the parts of the parameters that {_named(sorted(ranks))} hold were not all there within "
                f"{SECONDS:.0f} seconds"
            )
        return files


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
