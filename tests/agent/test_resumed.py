"""A process says whether it has opened the checkpoint that it was told to go back to."""

from __future__ import annotations

import builtins
import copy
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import pytest
import torch
from torch.distributed import checkpoint

from gradwatch.agent.probe.opened_files import OpenedFiles
from gradwatch.agent.probe.resumed import local_path
from tests.ranks import REPOSITORY, run_ranks
from tests.training.resuming import STEPS

RESUME_STEP = 30
# How it is loaded: whether it is.
ALONE = {
    "by_torch": True,
    "mapped": True,
    "through_a_link": True,
    "a_file_below": True,
    "by_safetensors": True,
    "by_distributed_checkpoint": True,
    "ignored": False,
    "a_neighbour": False,
}


@pytest.fixture
def pinned(tmp_path):
    """Makes a checkpoint, and says where."""

    def make(how):
        path = tmp_path / "step_3"
        if how == "by_safetensors":
            pytest.importorskip("safetensors.torch").save_file({"weight": torch.zeros(2)}, path)
        elif how == "by_distributed_checkpoint":
            checkpoint.save({"weight": torch.zeros(2)}, checkpoint_id=path, no_dist=True)
        elif how == "a_file_below":
            path.mkdir()
        else:
            torch.save({"weight": torch.zeros(2)}, path)
            # Its name only begins alike.
            torch.save({"weight": torch.zeros(2)}, tmp_path / "step_30")
        return str(path)

    return make


def read(spool):
    """By rank, what is said of resuming, and the last progress."""
    told = []
    for journal in sorted(spool.glob("rank*.jsonl")):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        assert not any("fault" in record for record in records), records
        name = journal.name.split(".")[0]
        progress = json.loads((spool / f"{name}.progress").read_text())
        told.append(([one["resumed"] for one in records if "resumed" in one], progress["step"]))
    return told


def resume_at(path):
    return {"GRADWATCH_RESUME_PATH": path, "GRADWATCH_RESUME_STEP": str(RESUME_STEP)}


def train_alone(spool, how, path):
    spool.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("GRADWATCH_", "RANK"))}
    env |= {"GRADWATCH_SPOOL": str(spool), "PYTHONPATH": str(REPOSITORY), **resume_at(path)}
    command = [sys.executable, "-m", "tests.training.resuming", how]
    subprocess.run(command, env=env, cwd=REPOSITORY, timeout=120, check=True)
    return read(spool)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("how", ALONE)
def test_it_says_once_whether_it_has_opened_it_and_counts_accordingly(how, pinned, tmp_path):
    path = pinned(how)
    opened = ALONE[how]
    assert train_alone(tmp_path / "spool", how, path) == [
        ([{"path": path, "opened": opened}], STEPS + (RESUME_STEP if opened else 0))
    ]


@pytest.mark.parametrize(("how", "opened"), [("by_another_rank", True), ("ignored", False)])
def test_one_rank_may_load_for_all(how, opened, pinned, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    path = pinned(how)
    run_ranks("tests.training.resuming", 2, [how], spool=spool, **resume_at(path))
    step = STEPS + (RESUME_STEP if opened else 0)
    assert read(spool) == [([{"path": path, "opened": opened}], step)] * 2


ORIGINALS = builtins.open, io.open, os.open, tarfile.bltn_open


def functions():
    return builtins.open, io.open, os.open, tarfile.bltn_open


def test_files_that_are_opened_are_told_until_it_is_over(tmp_path):
    path = tmp_path / "a.tar"
    told = []
    files = OpenedFiles(told.append)
    files.begin()
    try:
        tarfile.open(path, "w").close()
        open(path).close()  # noqa: PTH123
        open(file=path).close()  # noqa: PTH123
        path.open().close()
        os.close(os.open(path, os.O_RDONLY))
        assert told.count(str(path)) + told.count(path) == 5
        assert copy.deepcopy(open) is open
        assert isinstance(pickle.dumps(open), bytes)
        assert type("Opener", (), {"open": open})().open(path).close() is None, "it becomes no method"
    finally:
        files.end()
    told.clear()
    open(path).close()  # noqa: PTH123
    assert not told
    assert functions() == ORIGINALS
    assert pickle.loads(pickle.dumps(open)) is open


def test_what_others_have_put_around_it_stays(tmp_path, monkeypatch):
    told = []
    files = OpenedFiles(told.append)
    files.begin()
    ours = builtins.open

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    monkeypatch.setattr(builtins, "open", theirs)
    files.end()
    assert builtins.open is theirs
    open(tmp_path / "a", "w").close()  # noqa: PTH123
    assert not told
    monkeypatch.setattr(builtins, "open", ORIGINALS[0])
    assert functions() == ORIGINALS


def test_of_an_address_nothing_is_said(tmp_path):
    assert train_alone(tmp_path / "spool", "ignored", "s3://bucket/step_3") == [([], RESUME_STEP + STEPS)]


@pytest.mark.parametrize(
    ("path", "known"),
    [("/a/b", "/a/b"), ("a/b", "a/b"), ("s3://a/b", None), ("", None), (None, None)],
)
def test_which_paths_are_local(path, known):
    assert local_path(path) == known
