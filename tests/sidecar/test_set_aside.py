"""A task to set checkpoints aside: what may be moved, and what is said when it cannot."""

from __future__ import annotations

import pytest

from gradwatch.agent.checkpoints.listing import QUARANTINE
from gradwatch.agent.sidecar.set_aside import SetAside, set_aside

AT = "2026-01-02T03:04:05Z"


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    for name in ("a.pt", "b.pt"):
        (folder / name).write_bytes(b"x")
    return folder


def test_all_that_is_there_is_moved_and_the_same_again_says_the_same(root):
    paths = [str(root / name) for name in ("a.pt", "b.pt", "gone.pt")]
    for _ in range(2):
        assert set_aside(root, "d1", paths, "why", AT) == SetAside(moved=("a.pt", "b.pt"))
    assert (root / QUARANTINE / "d1" / "a.pt").exists()
    assert set_aside(root, "d2", [str(root / "gone.pt")], "why", AT) == SetAside()
    assert not (root / QUARANTINE / "d2").exists()


def test_a_root_that_is_a_link_was_declared_so(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    declared = tmp_path / "link"
    assert set_aside(declared, "d1", [str(declared / "a.pt")], "why", AT) == SetAside(moved=("a.pt",))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "a.pt", "{root}", "{root}/../a.pt", "{root}/out/x", "{root}-2/a.pt"]
)
def test_a_path_that_is_not_below_the_root_moves_nothing(root, tmp_path, path):
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"x")
    done = set_aside(root, "d1", [str(root / "b.pt"), path.format(root=root)], "why", AT)
    assert "below the root" in done.error
    assert (root / "b.pt").exists()


def test_why_it_could_not_be_is_said_in_words(root):
    (root / QUARANTINE).write_text("a file where the folder should be")
    done = set_aside(root, "d1", [str(root / "a.pt")], "why", AT)
    assert QUARANTINE in done.error
    assert not done.moved
    assert (root / "a.pt").exists()
