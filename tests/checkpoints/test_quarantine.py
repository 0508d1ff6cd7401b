"""Setting checkpoints aside and bringing them back: all or nothing, never deleting, inside the root only."""

from __future__ import annotations

import errno
import json
import os

import pytest

from gradwatch.agent.checkpoints import find, listing, moves
from gradwatch.agent.checkpoints import quarantine as module
from gradwatch.agent.checkpoints.listing import QUARANTINE
from gradwatch.agent.checkpoints.moves import Refusal, Refused
from gradwatch.agent.checkpoints.quarantine import Moved, restore

AT = "2026-01-02T03:04:05Z"
PATHS = ("step_1.pt", "checkpoint-9", "runs/a/step_2.pt")


def quarantine(root, identifier="d1", paths=PATHS):
    return module.quarantine(root, identifier, paths, "step 9 is poisoned", AT)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "checkpoint-9" / "model.safetensors").write_bytes(b"model")
    (folder / "step_1.pt").write_bytes(b"one")
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "step_2.pt").write_bytes(b"two")
    (folder / "keep.pt").write_bytes(b"keep")
    return folder


def content(root) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def test_there_and_back(root):
    before = content(root)
    inodes = {name: (root / name).stat().st_ino for name in before}
    assert quarantine(root) == Moved("d1", PATHS)
    assert [candidate.path for candidate in find.find(listing.take(root))] == ["keep.pt"]
    aside = root / QUARANTINE / "d1"
    assert (aside / "runs/a/step_2.pt").read_bytes() == b"two"
    manifest = json.loads((aside / module.MANIFEST).read_text())
    assert manifest == {"id": "d1", "reason": "step 9 is poisoned", "at": AT, "paths": list(PATHS)}
    assert restore(root, "d1") == Moved("d1", PATHS)
    assert content(root) == before
    # renamed, not copied
    assert {name: (root / name).stat().st_ino for name in before} == inodes
    assert list((root / QUARANTINE).iterdir()) == []


def test_the_same_call_again_changes_nothing(root):
    quarantine(root)
    after = content(root)
    assert quarantine(root) == Moved("d1", PATHS)
    assert content(root) == after
    # but the same name for something else does not
    refused = quarantine(root, paths=["keep.pt"])
    assert refused.why is Refusal.OCCUPIED
    assert content(root) == after


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.mark.parametrize("renames", range(4))
def test_a_call_that_was_killed_is_finished_by_the_next_or_undone(root, monkeypatch, renames):
    before = content(root)
    rename, left = os.rename, [renames]

    def killed(*arguments, **keywords):
        if not left[0]:
            raise KilledError
        left[0] -= 1
        rename(*arguments, **keywords)

    for finish in (quarantine, lambda root: restore(root, "d1")):
        left[0] = renames
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(KilledError):
                quarantine(root)
        if renames or finish is quarantine:
            assert finish(root) == Moved("d1", PATHS)
        if finish is quarantine:
            assert restore(root, "d1") == Moved("d1", PATHS)
        assert {name: data for name, data in content(root).items() if QUARANTINE not in name} == before


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.EXDEV, Refusal.OTHER_FILE_SYSTEM),
        (errno.ENOSPC, Refusal.DISK_FULL),
        (errno.EACCES, Refusal.NOT_PERMITTED),
        (errno.EIO, Refusal.FAILED),
    ],
)
@pytest.mark.parametrize("after", range(4))
def test_a_failure_half_way_leaves_all_where_it_was(root, monkeypatch, error, why, after):
    before = content(root)
    rename, calls = os.rename, []

    def fails(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == after + 1:
            raise OSError(error, os.strerror(error))
        rename(*arguments, **keywords)

    monkeypatch.setattr(os, "rename", fails)
    refused = quarantine(root)
    assert isinstance(refused, Refused)
    assert (refused.why, refused.left) == (why, ())
    assert os.strerror(error) in refused.message
    assert content(root) == before
    assert not (root / QUARANTINE / "d1").exists()


def test_a_restore_that_fails_half_way_leaves_all_in_quarantine(root):
    quarantine(root)
    (root / "checkpoint-9").mkdir()
    (root / "checkpoint-9" / "new").write_bytes(b"a new one of that name")
    aside = content(root)
    refused = restore(root, "d1")
    assert refused.why is Refusal.OCCUPIED
    assert "checkpoint-9" in refused.message
    assert content(root) == aside


def test_a_full_disk_is_noticed_before_anything_moves(root, monkeypatch):
    before = content(root)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert quarantine(root).why is Refusal.DISK_FULL
    assert content(root) == before
    monkeypatch.setattr(os, "mkdir", full)
    assert quarantine(root).why is Refusal.DISK_FULL


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["../outside.pt"], Refusal.OUTSIDE_ROOT),
        (["runs/../../outside.pt"], Refusal.OUTSIDE_ROOT),
        (["/etc/passwd"], Refusal.OUTSIDE_ROOT),
        (["."], Refusal.OUTSIDE_ROOT),
        ([""], Refusal.OUTSIDE_ROOT),
        ([f"{QUARANTINE}/d0/x"], Refusal.OUTSIDE_ROOT),
        (["link.pt"], Refusal.SYMLINK),
        (["linked/outside.pt"], Refusal.SYMLINK),
        (["step_1.pt/x"], Refusal.SYMLINK),
        (["missing.pt"], Refusal.MISSING),
        (["missing/x.pt"], Refusal.MISSING),
        # one bad path, and none is moved
        (["step_1.pt", "missing.pt"], Refusal.MISSING),
    ],
)
def test_what_is_refused(root, paths, why):
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "outside.pt").write_bytes(b"outside")
    (root.parent / "outside.pt").write_bytes(b"outside")
    (root / "link.pt").symlink_to(outside / "outside.pt")
    (root / "linked").symlink_to(outside)
    before = content(root.parent)
    refused = quarantine(root, paths=paths)
    assert refused.why is why
    assert content(root.parent) == before


@pytest.mark.parametrize("identifier", ["", "..", "a/b", ".hidden", "x" * 101, "a\0b"])
def test_names_that_are_refused(root, identifier):
    assert quarantine(root, identifier).why is Refusal.BAD_ID
    assert restore(root, identifier).why is Refusal.BAD_ID


def test_a_quarantine_that_is_itself_a_link_is_refused(root):
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (root / QUARANTINE).symlink_to(elsewhere)
    assert quarantine(root).why is Refusal.SYMLINK
    assert list(elsewhere.iterdir()) == []


def test_a_quarantine_that_is_not_there_or_has_lost_its_manifest(root):
    assert restore(root, "d1").why is Refusal.UNKNOWN_ID
    quarantine(root)
    manifest = root / QUARANTINE / "d1" / module.MANIFEST
    for damage in (b"{", b"[]", b'{"paths": [3]}'):
        manifest.write_bytes(damage)
        assert restore(root, "d1").why is Refusal.FAILED
    # nor may a manifest lead out of the root
    manifest.write_text(json.dumps({"paths": ["../../evil"]}))
    assert restore(root, "d1").why is Refusal.OUTSIDE_ROOT


def test_a_checkpoint_on_another_file_system_is_refused_before_anything_moves(root, monkeypatch):
    real = moves.status

    def mounted(within, name):
        seen = real(within, name)
        if name == "checkpoint-9" and seen is not None:
            return os.stat_result((*seen[:2], seen.st_dev + 1, *seen[3:10]))
        return seen

    before = content(root)
    monkeypatch.setattr(module, "status", mounted)
    assert quarantine(root).why is Refusal.OTHER_FILE_SYSTEM
    assert content(root) == before
    assert not (root / QUARANTINE).exists()


def test_what_vanished_after_a_call_that_was_killed_does_not_stop_the_next(root):
    """The manifest names all; one was moved, one was deleted by its owner before the call came again."""
    assert quarantine(root, paths=PATHS) == Moved("d1", PATHS)
    aside = root / QUARANTINE / "d1"
    (aside / "step_1.pt").rename(root / "step_1.pt")
    (aside / "runs/a/step_2.pt").unlink()
    left = PATHS[:2]
    assert quarantine(root, paths=left) == Moved("d1", left)
    assert json.loads((aside / module.MANIFEST).read_text())["paths"] == list(left)
    assert restore(root, "d1") == Moved("d1", left)


def test_what_is_in_quarantine_is_never_left_out_of_its_manifest(root):
    assert quarantine(root, paths=PATHS) == Moved("d1", PATHS)
    refused = quarantine(root, paths=PATHS[:2])
    assert isinstance(refused, Refused)
    assert refused.why is Refusal.OCCUPIED
