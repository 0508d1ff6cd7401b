"""Formats that torch no longer writes, and files that torch never would."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch

from gradwatch.agent.checkpoints import torch_file
from gradwatch.agent.checkpoints.look import look
from gradwatch.agent.checkpoints.result import Completeness
from gradwatch.agent.checkpoints.values import Extent, UnreadableError
from tests.checkpoints import files


def dumped(*values) -> bytes:
    return b"".join(pickle.dumps(value, protocol=2) for value in values)


class Named:
    """Pickles as a reference to something outside."""

    def __init__(self, key):
        self.key = key


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.key if isinstance(value, Named) else None


def tar_checkpoint(path, values: torch.Tensor) -> None:
    """As torch 0.1.10 wrote it; the reader is `_legacy_load` in torch/serialization.py."""
    storages = dumped(1, (11, "cpu", torch.FloatStorage)) + struct.pack("<q", values.numel())
    storages += values.numpy().tobytes() + dumped([])
    tensors = dumped(1, (22, 11, torch.FloatTensor)) + struct.pack("<i4x", 1)
    tensors += struct.pack("<qqq", values.numel(), 1, 0)
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"weight": Named("22")})
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("storages", storages), ("tensors", tensors), ("pickle", stream.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_the_tar_format(tmp_path):
    values = torch.arange(5.0)
    values[3] = files.NAN
    path = tmp_path / "old.pt"
    tar_checkpoint(path, values)
    # torch reads it the same way
    loaded = torch.load(path, weights_only=False)["weight"]
    assert torch.equal(loaded.isnan(), values.isnan())
    result = look(path)
    assert [(bad.name, bad.count) for bad in result.nonfinite] == [("weight", 1)]
    files.truncate(path, path.stat().st_size - 1200)
    assert look(files.age(path)).completeness is not Completeness.COMPLETE


def rezipped(path, change) -> None:
    """Write a torch file anew with members changed: name to data, None to leave it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(name, data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda old: {"a/data/0": None}, "storage 0 is missing"),
        (lambda old: {"a/data/0": old["a/data/0"][:-4]}, "storage 0 has 12 of 16 bytes"),
        (lambda old: {"a/byteorder": b"big"}, "its bytes are in big-endian order"),
        (lambda old: {"a/data.pkl": old["a/data.pkl"][:-20]}, "a damaged pickle"),
        # a view that reaches out of its storage
        (
            lambda old: {"a/data.pkl": old["a/data.pkl"].replace(b"K\x04", b"K\x09", 1)},
            "storage 0 has 16 of 36",
        ),
        (
            lambda old: {"a/data.pkl": old["a/data.pkl"].replace(b"FloatStorage", b"OtherStorage")},
            "a storage of type",
        ),
    ],
)
def test_a_zip_file_that_does_not_fit_together(tmp_path, change, reason):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(4)}, path)
    rezipped(path, change)
    with pytest.raises(UnreadableError, match=reason):
        torch_file.read(Extent.whole(path))
    result = look(files.age(path))
    assert result.finite is None


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("size", b"K\x0b", "ends at byte 44"), ("stride", b"K\x0b", "ends at byte 136")],
)
def test_a_view_that_reaches_out_of_its_storage(tmp_path, field, value, reason):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(4)}, path)

    def change(old):
        code = old["a/data.pkl"]
        place = code.rindex(b"K\x04\x85") if field == "size" else code.rindex(b"K\x01\x85")
        return {"a/data.pkl": code[:place] + value + code[place + 2 :]}

    rezipped(path, change)
    result = look(files.age(path))
    assert (result.completeness, result.finite) == (Completeness.TORN, None)
    assert reason in result.reason


def test_a_compressed_archive_is_not_read(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    result = look(path)
    assert "is compressed" in result.unreadable[0].reason
    assert result.finite is None


def test_tensors_that_name_the_same_bytes_over_and_over_are_not_read(tmp_path):
    base = torch.zeros(100_000)
    torch.save({f"w{index}": base[index:] for index in range(1000)}, tmp_path / "a.pt")
    result = look(tmp_path / "a.pt")
    assert result.finite is None
    assert "overlap" in result.unreadable[0].reason
