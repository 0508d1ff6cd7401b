"""Scans in a child process: results, crashes, kills, limits, and what the child may not do."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from gradwatch.agent.checkpoints import run
from gradwatch.agent.checkpoints.result import Completeness, ScanResult
from tests.checkpoints import files

CHILD = "gradwatch.agent.checkpoints.scan"


def scanned(paths) -> list[ScanResult]:
    async def collect():
        return [result async for result in run.run_scans(paths)]

    return asyncio.run(collect())


def test_what_the_sidecar_imports_is_free_of_torch():
    modules = ", ".join(
        f"gradwatch.agent.checkpoints.{name}" for name in ("find", "listing", "quarantine", "result", "run")
    )
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # nor does it read pickles itself
    assert not {"torch", "numpy", "pickletools", "zipfile"} & set(loaded.split())


def test_a_scan_in_a_child(tmp_path):
    network, optimizer = files.trained()
    files.plant(network[0].bias)
    path = files.save(tmp_path / "step_7.pt", network, optimizer)
    result = asyncio.run(run.run_scan(path))
    assert (result.path, result.completeness, result.finite) == (str(path), Completeness.COMPLETE, False)
    assert [bad.name for bad in result.nonfinite] == ["model.0.bias"]


def test_the_child_prints_one_document(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(3)}, path)
    done = subprocess.run(
        [sys.executable, "-m", CHILD, str(path), "--json"], capture_output=True, text=True, check=True
    )
    assert ScanResult.from_json(json.loads(done.stdout)).finite is True
    assert done.stderr == ""


def test_the_child_is_humble_and_no_rank(tmp_path):
    """At the lowest priority, idle in the disk's queue, and deaf to the environment of a watched job."""
    code = (
        "import os; from gradwatch.agent.checkpoints import scan; scan.be_humble(None); "
        "import psutil; print(os.nice(0), int(psutil.Process().ionice().ioclass))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["19", str(int(psutil.IOPRIO_CLASS_IDLE))]
    (tmp_path / "spool").mkdir()
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(3)}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWATCH_SPOOL", str(tmp_path / "spool"))
        assert asyncio.run(run.run_scan(path)).finite is True
    assert list((tmp_path / "spool").iterdir()) == []


def test_what_cannot_be_scanned_is_an_error_value(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    missing, empty = scanned([tmp_path / "missing", tmp_path / "empty"])
    assert missing.error == "cannot read it: No such file or directory"
    assert empty.error == "nothing in it looks like a checkpoint"


def fake_child(tmp_path, monkeypatch, code: str) -> None:
    """Let the scan be something else: a module of that name that does as told."""
    monkeypatch.setattr(run, "_MODULE", "fake_scan")
    (tmp_path / "fake_scan.py").write_text(
        "import json, os, signal, sys, time\n"
        "from gradwatch.agent.checkpoints.result import ScanResult\n"
        "paths = sys.argv[sys.argv.index('--') + 1:]\n"
        "def say(path): print(json.dumps(ScanResult(path, finite=True).to_json()), flush=True)\n" + code
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_child_that_dies_costs_one_checkpoint(tmp_path, monkeypatch):
    fake_child(
        tmp_path,
        monkeypatch,
        "for path in paths:\n"
        "    if path == '/b': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if path == '/d': sys.exit('no torch')\n"
        "    say(path)\n",
    )
    results = scanned([Path(name) for name in ("/a", "/b", "/c", "/d")])
    assert [(result.path, result.error) for result in results] == [
        ("/a", None),
        ("/b", "the scan was killed by signal 9"),
        ("/c", None),
        ("/d", "the scan ended with exit code 1: no torch"),
    ]


def test_a_file_that_is_cut_short_under_the_childs_hands_is_in_flight(tmp_path, monkeypatch):
    """The kernel's answer to reading what was mapped and is no more."""
    fake_child(tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGBUS)\n")
    result = asyncio.run(run.run_scan(tmp_path / "x.pt"))
    assert (result.completeness, result.finite, result.error) == (Completeness.IN_FLIGHT, None, None)


def test_a_child_that_prints_something_else_is_an_error_value(tmp_path, monkeypatch):
    fake_child(tmp_path, monkeypatch, "print('hello', flush=True)\ntime.sleep(60)\n")
    assert "printed something else" in asyncio.run(run.run_scan(tmp_path / "x.pt")).error


def test_a_scan_that_takes_too_long_is_killed(tmp_path, monkeypatch):
    fake_child(
        tmp_path,
        monkeypatch,
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n",
    )
    result = asyncio.run(run.run_scan(tmp_path / "x.pt", limit_seconds=1.0))
    assert result.error == "the scan took longer than 1 s"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_the_child_does_not_outlive_its_parent(tmp_path):
    code = f"import sys; from {CHILD} import be_humble; be_humble(int(sys.argv[1]))"
    assert subprocess.run([sys.executable, "-c", code, "1"], check=False).returncode == 1
    assert subprocess.run([sys.executable, "-c", code, str(os.getpid())], check=False).returncode == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_memory_is_bounded_however_large_the_checkpoint(tmp_path, legacy):
    """A checkpoint of 800 MB is scanned in 100 MB more than one of a few bytes."""
    small, large = tmp_path / "small.pt", tmp_path / "large.pt"
    torch.save({"w": torch.ones(3)}, small, _use_new_zipfile_serialization=not legacy)
    big = {"a": torch.zeros(100_000_000), "b": torch.zeros(200_000_000, dtype=torch.bfloat16)}
    torch.save(big, large, _use_new_zipfile_serialization=not legacy)
    peak = {}
    for path in (small, large):
        code = (
            f"import resource; from {CHILD} import scan_main; scan_main([{str(path)!r}, '--json']); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        document, kilobytes = done.stdout.splitlines()
        assert json.loads(document)["finite"] is True
        peak[path] = int(kilobytes)
    assert peak[large] - peak[small] < 100_000


def test_a_pickle_that_wants_all_memory_is_an_error_value(tmp_path):
    """Each operation doubles what it holds; the limit of the child stops it."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    text = b"X" + (1 << 24).to_bytes(4, "little") + b"x" * (1 << 24) + b"q\x00"
    again = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    data = path.read_bytes()
    body = data.index(b"}q\x00X\x01\x00\x00\x00w")
    path.write_bytes(data[:body] + b"(" + text + again * 2000 + b"l.")
    result = asyncio.run(run.run_scan(path))
    assert result.finite is None
    assert "more memory than there is" in result.unreadable[0].reason
