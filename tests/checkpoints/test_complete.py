"""Complete, in flight or torn: real files, cut short, withheld, and written to meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import safetensors.torch
import torch

from gradwatch.agent.checkpoints import complete
from gradwatch.agent.checkpoints import look as module
from gradwatch.agent.checkpoints.listing import File
from gradwatch.agent.checkpoints.look import look
from gradwatch.agent.checkpoints.result import Completeness
from tests.checkpoints import files

COMPLETE, IN_FLIGHT, TORN = Completeness.COMPLETE, Completeness.IN_FLIGHT, Completeness.TORN
SECOND = 10**9


@pytest.mark.parametrize(
    ("problems", "before", "after", "verdict"),
    [
        ([], {".": File(9, 1)}, {".": File(9, 1)}, COMPLETE),
        # it changes between two looks
        ([], {".": File(9, 1)}, {".": File(10, 1)}, IN_FLIGHT),
        ([], {".": File(9, 1)}, {".": File(9, 2)}, IN_FLIGHT),
        ([], {".": File(9, 1, (0, 1))}, {".": File(9, 1, (0, 2))}, IN_FLIGHT),
        ([], {"a": File(9, 1)}, {"a": File(9, 1), "b": File(1, 1)}, IN_FLIGHT),
        ([], {"a": File(9, 1)}, {}, IN_FLIGHT),
        # something is missing, and it was written to a moment ago, or by a clock ahead of ours
        (["x"], {".": File(9, 990 * SECOND)}, {".": File(9, 990 * SECOND)}, IN_FLIGHT),
        (["x"], {".": File(9, 1030 * SECOND)}, {".": File(9, 1030 * SECOND)}, IN_FLIGHT),
        # or long ago
        (["x"], {".": File(9, 900 * SECOND)}, {".": File(9, 900 * SECOND)}, TORN),
    ],
)
def test_verdicts(problems, before, after, verdict):
    assert complete.verdict(problems, before, after, now=1000.0)[0] is verdict


def saved(tmp_path, layout):
    network, optimizer = files.trained()
    make = {
        "zip": lambda: files.save(tmp_path / "a.pt", network, optimizer),
        "hf": lambda: files.hf(tmp_path / "checkpoint-3", network, optimizer, step=3, shards=2),
        "dcp": lambda: files.dcp(tmp_path / "step-3", network, optimizer),
    }
    return make[layout]()


def legacy(tmp_path):
    network, optimizer = files.trained()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    return tmp_path / "a.pt"


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_short_is_torn_and_just_then_in_flight(tmp_path, layout, fraction):
    if layout == "safetensors":
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file({"w": torch.ones(1000), "v": torch.ones(10)}, path)
    else:
        path = legacy(tmp_path) if layout == "legacy" else saved(tmp_path, "zip")
    files.truncate(path, max(1, int(path.stat().st_size * (1 - fraction))))
    assert look(path).completeness is IN_FLIGHT
    result = look(files.age(path))
    assert (result.completeness, result.finite) == (TORN, None), result
    assert result.reason


def test_a_zip_file_with_a_whole_directory_and_missing_bytes_is_torn(tmp_path):
    path = saved(tmp_path, "zip")
    data = path.read_bytes()
    # as a copy that lost a block in the middle
    path.write_bytes(data[:1000] + data[1500:])
    result = look(files.age(path))
    assert (result.completeness, result.finite) == (TORN, None)


def test_a_file_that_grows_during_the_scan_is_in_flight(tmp_path, monkeypatch):
    path = saved(tmp_path, "zip")
    opened = module.open_checkpoint

    def grows(*arguments):
        result = opened(*arguments)
        with path.open("ab") as file:
            file.write(b"more")
        return result

    monkeypatch.setattr(module, "open_checkpoint", grows)
    result = look(files.age(path))
    assert (result.completeness, result.finite) == (IN_FLIGHT, None)
    assert "grew from" in result.reason


def test_a_file_that_is_deleted_during_the_scan_is_no_crash(tmp_path, monkeypatch):
    path = saved(tmp_path, "dcp")
    opened = module.open_checkpoint

    def rotated(*arguments):
        result = opened(*arguments)
        shutil.rmtree(path)
        return result

    monkeypatch.setattr(module, "open_checkpoint", rotated)
    result = look(path)
    assert (result.completeness, result.finite) == (IN_FLIGHT, None)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: files.truncate(folder / name, 10)


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def link(name):
    def replace(folder):
        target = folder.parent / "elsewhere"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return replace


HF_SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("layout", "damage", "reason"),
    [
        ("hf", remove(HF_SHARD), f"{HF_SHARD}, which the index names, is missing"),
        ("hf", link(HF_SHARD), f"{HF_SHARD}, which the index names, is missing"),
        ("hf", cut(HF_SHARD), f"{HF_SHARD}: its header says"),
        ("hf", cut("optimizer.pt"), "optimizer.pt: its zip directory"),
        # nobody judges it, but nobody can resume without it either
        ("hf", cut("scheduler.pt"), "scheduler.pt: its zip directory"),
        ("hf", write("rng_state.pth", b""), "rng_state.pth: it is empty"),
        ("hf", cut("trainer_state.json"), "trainer_state.json: it is not whole JSON"),
        ("dcp", remove(".metadata"), ".metadata, which is written last, is missing"),
        ("dcp", cut(".metadata"), ".metadata: a damaged pickle"),
        ("dcp", remove("__0_0.distcp"), "__0_0.distcp is missing"),
        ("dcp", cut("__0_0.distcp"), "__0_0.distcp has "),
        ("dcp", link("__0_0.distcp"), "__0_0.distcp is missing"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path, layout, damage, reason):
    folder = saved(tmp_path, layout)
    damage(folder)
    files.age(folder)
    result = look(folder)
    assert (result.completeness, result.reason[: len(reason)]) == (TORN, reason)
    assert result.finite is None


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "scheduler.pt"])
def test_what_the_checkpoints_beside_it_have_is_expected(tmp_path, name):
    network, optimizer = files.trained()
    files.hf(tmp_path / "checkpoint-3", network, optimizer, step=3)
    late = files.hf(tmp_path / "checkpoint-6", network, optimizer, step=6)
    (late / name).unlink()
    assert look(late).completeness is IN_FLIGHT
    assert look(files.age(late)).completeness is TORN
    # where none has it, none is expected
    (tmp_path / "checkpoint-3" / name).unlink()
    assert look(late).completeness is COMPLETE


def test_a_second_save_into_a_dcp_folder_that_did_not_finish(tmp_path):
    folder = files.age(saved(tmp_path, "dcp"))
    shard, metadata = folder / "__0_0.distcp", folder / ".metadata"
    written = metadata.stat().st_mtime_ns
    # .metadata is the old one, and vouches for shards that are gone
    os.utime(shard, ns=(written + 1, written + 1))
    result = look(folder)
    assert (result.completeness, result.finite) == (TORN, None)
    assert "newer than .metadata" in result.reason
    os.utime(shard)
    assert look(folder).completeness is IN_FLIGHT
    # once it finishes, .metadata is new
    os.utime(metadata)
    assert look(folder).completeness is COMPLETE


def test_metadata_that_points_out_of_its_folder_is_refused(tmp_path):
    folder = files.age(saved(tmp_path, "dcp"))
    metadata = folder / ".metadata"
    data = metadata.read_bytes()
    metadata.write_bytes(data.replace(b"__0_0.distcp", b"../../passwd"))
    assert "names a file outside of the folder" in look(folder).reason


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "its header is not JSON"),
        (
            json.dumps({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode(),
            "its header gives w",
        ),
        (
            json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}).encode(),
            "its header says",
        ),
        (json.dumps({"w": 3}).encode(), "its header does not describe w"),
        (b"[" * 100_000, "its header is not JSON"),
    ],
)
def test_a_damaged_safetensors_header(tmp_path, header, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    result = look(files.age(path))
    assert result.finite is None
    told = [result.reason, *(item.reason for item in result.unreadable)]
    assert any(words.startswith(reason) for words in told), told


def test_a_symlink_is_not_looked_at(tmp_path):
    path = saved(tmp_path, "zip")
    (tmp_path / "last.pt").symlink_to(path)
    assert "symbolic link" in look(tmp_path / "last.pt").error
