"""Checkpoints by URL: on an S3 service, and wherever else fsspec reaches."""

from __future__ import annotations

import builtins
import os
import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch.distributed.checkpoint as dcp

from gradwatch.agent.checkpoints import find, look, remote, scan
from gradwatch.agent.checkpoints.place import Folder, Remote, place_of
from gradwatch.agent.checkpoints.result import Completeness, Layout
from gradwatch.agent.checkpoints.survey import survey
from tests.checkpoints import files
from tests.checkpoints.test_run import scanned
from tests.s3 import s3_bucket


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with s3_bucket(tmp_path_factory.mktemp("s3") / "log") as found:
        yield found


@pytest.fixture
def bucket(service, monkeypatch, tmp_path):
    for name, value in service.environ.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield service
    service.system.rm(f"{service.url}/run", recursive=True)


def saved(path, *, nan=False):
    network, optimizer = files.trained()
    if nan:
        files.plant(network[0].bias)
    return files.save(path, network, optimizer, global_step=5)


def test_what_lies_in_a_bucket_is_found_and_judged(bucket, tmp_path):
    good = bucket.put(saved(tmp_path / "step_1.pt"), "run/step_1.pt")
    bad = bucket.put(saved(tmp_path / "step_2.pt", nan=True), "run/step_2.pt")
    sharded = tmp_path / "step_3"
    network, _ = files.trained()
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": network.state_dict()}, checkpoint_id=sharded, no_dist=True)
    folder = bucket.put(sharded, "run/step_3")
    place = place_of(f"{bucket.url}/run/")
    place.check()
    seen = survey(place, Layout.AUTO).seen
    assert [place.address(path) for path in sorted(seen)] == [good, bad, folder]
    results = scanned([good, bad, folder])
    assert [one.path for one in results] == [good, bad, folder]
    assert [(one.completeness, one.finite) for one in results] == [
        (Completeness.COMPLETE, True),
        (Completeness.COMPLETE, False),
        (Completeness.COMPLETE, True),
    ]
    assert [bad.name for bad in results[1].nonfinite] == ["model.0.bias"]
    assert results[2].layout == "dcp"
    assert not [*(tmp_path / "tmp").glob("gradwatch-*")], "what was fetched is removed"


def test_what_stands_for_a_folder_is_no_file(bucket, tmp_path):
    """As pyarrow writes them, and so Ray."""
    import pyarrow.fs

    system, path = pyarrow.fs.FileSystem.from_uri(f"{bucket.url}/run/checkpoint_1")
    assert place_of(f"{bucket.url}/run").take().files == {}
    system.create_dir(path)
    system.create_dir(f"{path}/empty")
    bucket.put(saved(tmp_path / "model.pt"), "run/checkpoint_1/model.pt")
    bucket.put(saved(tmp_path / "optimizer.pt"), "run/checkpoint_1/optimizer.pt")
    assert "checkpoint_1/model.pt" in place_of(f"{bucket.url}/run").take().files
    (result,) = scanned([f"{bucket.url}/run/checkpoint_1"])
    assert (result.completeness, result.finite) == (Completeness.COMPLETE, True)


def test_overwritten_with_as_many_bytes_in_the_same_second_it_is_another_one(bucket):
    place = place_of(f"{bucket.url}/run")
    seen = set()
    for content in (b"one", b"two"):
        bucket.system.pipe_file(f"{bucket.url}/run/x.pt", content)
        seen.add(survey(place, Layout.AUTO).seen["x.pt"].fingerprint)
    assert len(seen) == 2


def test_nothing_there_yet_is_an_empty_folder_and_no_bucket_is_an_error(bucket):
    bucket.system.touch(f"{bucket.url}/run/.x")
    assert place_of(f"{bucket.url}/later").take().files == {}
    with pytest.raises(OSError, match="bucket"):
        place_of("s3://nowhere/run").check()


def test_one_that_is_rewritten_while_it_is_fetched_is_in_flight(bucket, tmp_path, monkeypatch):
    url = bucket.put(saved(tmp_path / "step_1.pt"), "run/step_1.pt")
    real = look.look

    def while_it_is_looked_at(path):
        bucket.put(saved(tmp_path / "another.pt", nan=True), "run/step_1.pt")
        return real(path)

    monkeypatch.setattr(look, "look", while_it_is_looked_at)
    result = scan._scan(url, tmp_path)
    assert (result.completeness, result.finite) == (Completeness.IN_FLIGHT, None)
    assert "meanwhile" in result.reason


def test_one_that_does_not_fit_is_not_fetched(bucket, tmp_path, monkeypatch):
    url = bucket.put(saved(tmp_path / "step_1.pt"), "run/step_1.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    result = scan._scan(url, tmp_path)
    assert "has 100 left: set TMPDIR to where there is more" in result.error


def test_what_a_killed_scan_has_left_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # No process has this number.
    for name in ("gradwatch-fetched-999999999-x", f"gradwatch-fetched-{os.getpid()}-y"):
        (tmp_path / name).mkdir()
    with remote.scratch() as folder:
        assert folder.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [f"gradwatch-fetched-{os.getpid()}-y"]


def test_without_fsspec_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "fsspec":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OSError, match=r"pip install 'gradwatch\[remote\]'"):
        remote.take("s3://bucket/run")


def test_a_protocol_that_nobody_knows_or_that_lacks_a_package_is_an_error():
    with pytest.raises(OSError, match="Protocol not known"):
        remote.take("nonsense://bucket/run")


def test_a_local_folder_by_url_is_looked_at_alike(tmp_path):
    saved(tmp_path / "step_1.pt", nan=True)
    place = place_of(tmp_path.as_uri())
    assert isinstance(place, Remote)
    (candidate,) = find.find(place.take())
    (result,) = scanned([place.address(candidate.path)])
    assert (result.finite, result.path) == (False, f"file://{tmp_path}/step_1.pt")


@pytest.mark.parametrize("path", ["../x", "a/../../x", ".."])
def test_a_name_that_leads_out_is_not_scanned(path):
    assert not place_of("s3://bucket/run").holds(path)


def test_what_is_no_url_is_a_folder():
    assert isinstance(place_of("/ckpts"), Folder)
    assert str(place_of("ckpts")) == os.path.abspath("ckpts")  # noqa: PTH100


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (1.5, 1.5),
        ("1970-01-01T00:00:02Z", 2.0),
        ("1970-01-01 00:00:02", 2.0),
        ("no time", 0.0),
        (None, 0.0),
    ],
)
def test_times_in_whatever_form(time, seconds):
    assert remote._nanoseconds(time) == seconds * 1e9
