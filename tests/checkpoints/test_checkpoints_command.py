"""`gradwatch checkpoints`, as a process of its own."""

from __future__ import annotations

import pytest

from gradwatch.agent.checkpoints import quarantine
from tests.checkpoints import files
from tests.cli.command import gradwatch


@pytest.fixture
def root(tmp_path):
    network, optimizer = files.trained()
    files.hf(tmp_path / "checkpoint-3", network, optimizer, step=3)
    torn = files.save(tmp_path / "step_5.pt", network, optimizer)
    files.truncate(torn, 100)
    files.age(torn)
    files.plant(network[2].weight, count=4)
    files.lightning(tmp_path / "epoch=1-step=9.ckpt", network, optimizer, step=9)
    return tmp_path


def test_a_table_for_people(root):
    done = gradwatch("checkpoints", "scan", root)
    lines = [line.strip().split(maxsplit=4) for line in done.stdout.splitlines()]
    assert lines == [
        ["path", "step", "complete", "finite", "where bad"],
        ["checkpoint-3", "3", "yes", "yes", "-"],
        ["epoch=1-step=9.ckpt", "9", "yes", "NO", "parameters state_dict.net.2.weight: 4 nan"],
        ["step_5.pt", "5", "torn", "-", lines[3][4]],
    ]
    assert lines[3][4].startswith("its zip directory, which is written last, is missing")
    assert done.stderr.splitlines()[0] == f"scanning 1 of 3: {root}/checkpoint-3"
    assert done.returncode == 1


def test_json_for_programs(root):
    done = gradwatch("checkpoints", "scan", root, "--json", "--layout", "hf")
    assert done.returncode == 0
    assert done.stderr == ""
    (result,) = done.json["checkpoints"]
    assert (result["layout"], result["completeness"], result["finite"]) == ("hf", "complete", True)


def test_one_checkpoint_can_be_named(root):
    alone = gradwatch("checkpoints", "scan", root / "checkpoint-3", "--json")
    assert [item["path"] for item in alone.json["checkpoints"]] == [str(root / "checkpoint-3")]
    assert alone.json["checkpoints"][0]["completeness"] == "complete"
    file = gradwatch("checkpoints", "scan", root / "epoch=1-step=9.ckpt")
    assert file.returncode == 1


def test_nothing_there(tmp_path):
    done = gradwatch("checkpoints", "scan", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"no checkpoints under {tmp_path}\n")
    done = gradwatch("checkpoints", "scan", tmp_path / "missing")
    assert (done.returncode, done.ours) == (
        2,
        [f"gradwatch: cannot read {tmp_path}/missing: No such file or directory"],
    )


def test_restore(root):
    quarantine.quarantine(root, "d1", ["checkpoint-3"], "why", "2026-01-02T03:04:05Z")
    done = gradwatch("checkpoints", "restore", "d1", "--root", root)
    assert (done.returncode, done.stdout) == (0, f"restored {root}/checkpoint-3\n")
    again = gradwatch("checkpoints", "restore", "d1", "--root", root)
    assert again.returncode == 1
    assert again.ours == [f"gradwatch: there is no quarantine d1 in {root}/.gradwatch-quarantine"]
