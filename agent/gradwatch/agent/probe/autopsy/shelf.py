"""What ranks of the same host lay down for one another: files beside the journals.

A rank lays its capsule down before the last bucket of the round is reduced, so that whoever sees what the
reduction gave finds it. Two others at most read it, and its owner deletes it a round later, when they have
done so. None leaves the host.

Where the parameters are sharded, a replay needs those of the others. Whoever has bad gradients asks for them
before these are reduced, so that whoever sees what the reduction gave sees that they are wanted.
"""

from __future__ import annotations

import io
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.autopsy.capsule import Capsule, RandomState

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

_POLL_SECONDS = 0.002
_SHARDS = ".shards"
_DECLINED = "declined"
_HOST = torch.device("cpu")
_DEVICES = ("cpu", "cuda")
# As it is before `patch_saves`: this is no checkpoint.
_save = torch.save


class NotShareable(Exception):  # noqa: N818 - an outcome
    """It holds something that cannot be read back without running code of somebody's."""


@dataclass(frozen=True)
class Taken:
    """Another rank's capsule.

    Attributes:
        rank: whose it is.
        capsule: what is to be replayed.
        state: of Python, as `State.plain` gave it; None where it was not kept.
        about: plain values that went with it.
    """

    rank: int
    capsule: Capsule
    state: dict[str, Any] | None
    about: dict[str, Any]


class Shelf:
    """The folder of one host's capsules.

    Args:
        folder: the spool of the run.
        attempt: what the ranks of this rendezvous have in common.
    """

    def __init__(self, folder: Path, attempt: str) -> None:
        self._folder = folder / spool.CAPSULES
        self._attempt = attempt
        self._own: list[Path] = []
        self._round: tuple[int, int] | None = None

    def put(self, name: tuple[int, int], rank: int, capsule: Capsule, about: dict[str, Any]) -> None:
        """Lay a capsule down for others.

        Args:
            name: root and round.
            rank: whose it is.
            capsule: what is to be replayed.
            about: plain values that go with it.

        Raises:
            NotShareable: it does not consist of tensors and plain containers.
            OSError: it cannot be written.
        """
        content = {
            "args": _plain(capsule.args),
            "kwargs": _plain(capsule.kwargs),
            "rng": None if capsule.rng is None else _plain([*vars(capsule.rng).values()]),
            "autocast": capsule.autocast,
            "entering": _plain(capsule.entering),
            "numbers": capsule.numbers,
            "threads": capsule.threads,
            "settings": capsule.settings,
            "doubts": [*capsule.doubts, *([] if capsule.state is None else capsule.state.doubts())],
            "state": None if capsule.state is None else _plain(capsule.state.plain()),
            "about": _plain(about),
        }
        self._lay_down(name, f"{rank}{spool.CAPSULE_SUFFIX}", content)

    def take(self, name: tuple[int, int], device: torch.device = _HOST, *, most: int = 1) -> Taken | None:
        """The capsule of another rank; None when there is none that not so many others have taken already.

        Args:
            name: root and round.
            device: where the model of this rank is: what was on the other rank's device is put there.
            most: how many ranks may take one.

        Raises:
            OSError: it cannot be read.
        """
        prefix = self._prefix(name)
        for path in sorted(self._folder.glob(f"{prefix}*{spool.CAPSULE_SUFFIX}")):
            rank = int(path.name.removeprefix(prefix).removesuffix(spool.CAPSULE_SUFFIX))
            if not any(self._is_first(name, f"{rank}.taken{number}") for number in range(most)):
                continue
            with suppress(FileNotFoundError):
                return _read(path, rank, device)
        return None

    def decline(self, name: tuple[int, int]) -> None:
        """Say that this rank will lay down no capsule of this round. Does without a disk that is full."""
        with suppress(OSError):
            self._write(name, _DECLINED, b"")

    def wait_for_capsule(self, name: tuple[int, int], seconds: float) -> bool:
        """Whether a rank of this host lays down a capsule of this round, in time.

        Raises:
            OSError: it cannot be looked for.
        """
        prefix, until = self._prefix(name), time.monotonic() + seconds
        while not any(self._folder.glob(f"{prefix}*{spool.CAPSULE_SUFFIX}")):
            if time.monotonic() >= until or (self._folder / f"{prefix}{_DECLINED}").exists():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def ask(self, name: tuple[int, int], rank: int, ranks: Sequence[int]) -> None:
        """Have the ranks of this host lay their shards down, once they have seen the reduction of the round.

        Args:
            name: root and round.
            rank: who asks; only the first one is remembered.
            ranks: that train the model together.

        Raises:
            OSError: it cannot be written.
        """
        with suppress(FileExistsError):
            self._write(name, "wanted", json.dumps([rank, [*ranks]]).encode())

    def asked(self, name: tuple[int, int], ranks: Sequence[int]) -> int | None:
        """Who has asked for the shards of the model that these ranks train together; None when nobody has.

        Raises:
            OSError: it cannot be read.
        """
        try:
            rank, of_ranks = json.loads((self._folder / f"{self._prefix(name)}wanted").read_bytes())
        except FileNotFoundError:
            return None
        return int(rank) if of_ranks == [*ranks] else None

    def claim(self, name: tuple[int, int], *, most: int = 1) -> bool:
        """Whether not so many others are to replay another rank's capsule of this round.

        Raises:
            OSError: it cannot be written.
        """
        return any(self._is_first(name, f"claimed{number}") for number in range(most))

    def _is_first(self, name: tuple[int, int], what: str) -> bool:
        try:
            self._write(name, what, b"")
        except FileExistsError:
            return False
        return True

    def put_shards(self, name: tuple[int, int], rank: int, shards: Sequence[torch.Tensor]) -> None:
        """Lay down what this rank holds of the parameters.

        Raises:
            OSError: it cannot be written.
        """
        self._lay_down(name, f"{rank}{_SHARDS}", [*shards])

    def open_shards(
        self, name: tuple[int, int], ranks: Collection[int], seconds: float
    ) -> dict[int, IO[bytes]] | None:
        """What these ranks have laid down: it may be deleted once it is open.

        Args:
            name: root and round.
            ranks: whose.
            seconds: how long to wait for them.

        Returns:
            By rank; None when not all have come.

        Raises:
            OSError: it cannot be read.
        """
        paths = {rank: self._folder / f"{self._prefix(name)}{rank}{_SHARDS}" for rank in ranks}
        if not _wait_for(paths.values(), seconds):
            return None
        found: dict[int, IO[bytes]] = {}
        try:
            for rank, path in paths.items():
                found[rank] = path.open("rb")
        except OSError:
            close(found)
            raise
        return found

    def opened(self, name: tuple[int, int]) -> None:
        """Whoever has asked for the shards has them open, or needs them no more.

        Raises:
            OSError: it cannot be written.
        """
        with suppress(FileExistsError):
            self._write(name, "opened", b"")

    def wait_until_opened(self, name: tuple[int, int], seconds: float) -> None:
        """Wait until these shards are not needed any more, by whoever has asked for them."""
        _wait_for([self._folder / f"{self._prefix(name)}opened"], seconds)

    def clear(self) -> None:
        """Delete what we have laid down and nobody took."""
        while self._own:
            self._own.pop().unlink(missing_ok=True)

    def _lay_down(self, name: tuple[int, int], what: str, content: Any) -> None:
        # In memory first: what torch raises when the disk is full is no OSError.
        whole = io.BytesIO()
        _save(content, whole)
        self._write(name, what, whole.getbuffer())

    def _write(self, name: tuple[int, int], what: str, data: bytes | memoryview) -> None:
        """All of it at once, as far as anybody sees. What we have laid down in another round is deleted.

        Raises:
            FileExistsError: there is such a file.
            OSError: it cannot be written.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._forget_other_attempts()
        if name != self._round:
            self.clear()
        self._round = name
        path = self._folder / f"{self._prefix(name)}{what}"
        unfinished = self._folder / f"{self._attempt}-{os.getpid()}"
        try:
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(data)
            # Unlike a rename, which would take the place of another rank's.
            os.link(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        self._own.append(path)

    def _prefix(self, name: tuple[int, int]) -> str:
        root, round_ = name
        return f"{self._attempt}-{root}-{round_}-"

    def _forget_other_attempts(self) -> None:
        """What killed ranks have left behind."""
        for path in self._folder.iterdir():
            if not path.name.startswith(f"{self._attempt}-"):
                with suppress(OSError):
                    path.unlink()


def _read(path: Path, rank: int, device: torch.device) -> Taken:
    """A capsule that was laid down.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = torch.load(
            file,
            weights_only=True,
            map_location=lambda storage, at: storage if at == "cpu" else _moved(storage, device),
        )
    capsule = Capsule(
        tuple(content["args"]),
        content["kwargs"],
        None if content["rng"] is None else RandomState(*content["rng"]),
        tuple(content["autocast"]),
        device,
        content["entering"],
        content["numbers"],
        threads=content["threads"],
        settings=tuple(content["settings"]),
        doubts=content["doubts"],
    )
    return Taken(rank, capsule, content["state"], content["about"])


def read_shards(files: Mapping[int, IO[bytes]]) -> dict[int, list[torch.Tensor]]:
    """What ranks have laid down, by rank."""
    for file in files.values():
        # Several children of one process share the place in it.
        file.seek(0)
    return {rank: torch.load(file, weights_only=True) for rank, file in files.items()}


def close(files: Mapping[int, IO[bytes]]) -> None:
    """Close them all."""
    for file in files.values():
        file.close()


def _wait_for(paths: Collection[Path], seconds: float) -> bool:
    """Whether all of them are there in time."""
    until = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        if time.monotonic() >= until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _moved(storage: Any, device: torch.device) -> Any:
    return storage if device.type == "cpu" else storage.cuda(device)


def _plain(value: Any) -> Any:
    """A copy of tensors in plain containers, which does not drag along what they are views of."""
    kind = type(value)
    if (
        kind in {torch.Tensor, torch.nn.Parameter}
        and value.layout == torch.strided
        and value.device.type in _DEVICES
    ):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if kind in {str, int, float, bool, type(None)}:
        return value
    if kind in {list, tuple}:
        return kind(_plain(one) for one in value)
    if kind is dict:
        return {_plain(key): _plain(one) for key, one in value.items()}
    raise NotShareable(f"its input holds a {kind.__name__}, which is not handed on")
