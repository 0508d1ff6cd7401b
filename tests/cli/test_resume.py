"""What the command is told to resume, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gradwatch.agent.launch import resume as told
from gradwatch.agent.launch.orders import Action, Order
from gradwatch.cli.launcher import resume
from gradwatch.cli.launcher.job_view import JobView
from gradwatch.cli.launcher.opened import OpenedWatch
from gradwatch.cli.launcher.performer import Performer


@pytest.mark.parametrize(
    ("command", "with_path", "without"),
    [
        ("train.py --lr 1", "train.py --lr 1", "train.py --lr 1"),
        # a flag and its value go together
        ("train.py --resume {resume} --lr 1", "train.py --resume /c --lr 1", "train.py --lr 1"),
        ("train.py --resume={resume} --lr 1", "train.py --resume=/c --lr 1", "train.py --lr 1"),
        ("train.py --a=1 {resume}", "train.py --a=1 /c", "train.py --a=1"),
        ("train.py +ckpt={resume}/x", "train.py +ckpt=/c/x", "train.py"),
        # a flag that has its value already, or stands before another flag, is left alone
        ("train.py --fast --resume={resume}", "train.py --fast --resume=/c", "train.py --fast"),
        ("train.py -v {resume}", "train.py -v /c", "train.py -v"),
        ("train.py -- {resume}", "train.py -- /c", "train.py --"),
        ("train.py --r {resume} --s {resume}", "train.py --r /c --s /c", "train.py"),
    ],
)
def test_the_mark_in_arguments(command, with_path, without):
    words = command.split()
    assert resume.arguments(words, "/c") == tuple(with_path.split())
    assert resume.arguments(words, "") == tuple(without.split())


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        (["bash", "-c", "train.py {resume}"], True),
        (["/bin/sh", "-ec", "train.py {resume}"], True),
        (["bash", "-x", "-c", "train.py {resume}"], True),
        (["env", "A=1", "bash", "-lc", "train.py {resume}"], True),
        (["{resume}"], True),
        # a script, and an argument of the string, are no shell code
        (["bash", "train.sh", "{resume}"], False),
        (["bash", "-c", 'train.py "$1"', "bash", "{resume}"], False),
        (["python", "-c", "import sys", "{resume}"], False),
        (["bash", "-c", "train.py"], False),
    ],
)
def test_the_mark_inside_shell_code_is_refused(command, refused):
    assert (resume.why_refused(command) is not None) == refused


def test_the_environment_of_a_resume():
    order = Order("d", Action.START, 1, resume_path="/c", resume_step=0, skip_batches=2)
    assert told.variables(order) == {
        "GRADWATCH_RESUME_PATH": "/c",
        "GRADWATCH_RESUME_STEP": "0",
        "GRADWATCH_SKIP_BATCHES": "2",
    }
    assert told.variables(Order("d", Action.START, 1, skip_batches=2)) == {}
    assert told.variables(None) == {}


def test_only_what_lies_below_the_root_is_resumed_from(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root-of-others"
    (root / "step_1").mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "inner-link").symlink_to(root / "step_1")

    def why(path: object) -> str | None:
        return told.why_not_usable(str(path), str(root))

    assert why(root / "step_1") is None
    assert why(root / "inner-link") is None
    for path in (root, outside, root / "link", root / ".." / outside.name, "step_1", "/etc/passwd"):
        assert "does not lie below" in (why(path) or "")
    assert "is not there" in (why(root / "step_2") or "")
    assert "declares no" in (told.why_not_usable(str(root / "step_1"), None) or "")


def test_below_a_url_only_what_lies_below_it_is_resumed_from():
    root = "s3://bucket/run/"
    assert told.why_not_usable("s3://bucket/run/step_1", root) is None
    for path in (
        "s3://bucket/running/step_1",
        "s3://bucket/run/../x",
        "/s3://bucket/run/step_1",
        "s3://bucket/run",
    ):
        assert "does not lie below" in (told.why_not_usable(path, root) or "")


def test_whether_a_checkpoint_was_opened(tmp_path):
    folder = tmp_path / "step_1" / "shards"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"x")
    watch = OpenedWatch(str(folder.parent))
    # Looking at it is not reading it.
    assert len(list(folder.iterdir())) == 1
    (folder / "model.pt").stat()
    assert watch.opened() is False
    (folder / "model.pt").read_bytes()
    assert watch.opened() is True
    watch.close()
    assert watch.opened() is True
    assert OpenedWatch(str(tmp_path / "absent")).opened() is None


# The command, what its ranks say of the checkpoint, what the report says, and whether it is warned here: what
# ranks say is among the collector's warnings.
HONOURED = [
    ("train.py --resume {resume}", None, True, False),
    ("train.py --resume {resume}", False, False, False),
    ("train.py --resume {resume}", True, True, False),
    ("train.py", True, True, False),
    ("train.py", False, False, False),
    ("train.py", None, False, True),
]


@pytest.mark.parametrize(("command", "said", "honoured", "warned"), HONOURED)
def test_what_ranks_say_of_a_resume_counts_for_more_than_the_command(
    tmp_path, command, said, honoured, warned
):
    warnings: list[str] = []
    config = SimpleNamespace(command=tuple(command.split()))
    performer = Performer(config, None, None, None, SimpleNamespace(warn=warnings.append))
    performer.resumed = Order("d", Action.START, 0, resume_path=str(tmp_path), resume_step=5)
    performer._opened = OpenedWatch(str(tmp_path))
    view = JobView(resume={"path": str(tmp_path), "generation": 0, "honoured": said})
    assert performer.resume_document(view)["honoured"] is honoured
    performer.warn_if_not_honoured(view)
    assert [text.startswith("not honoured") for text in warnings] == [True] * warned
