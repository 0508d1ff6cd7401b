"""Back to a checkpoint in process: all ranks in the same iteration, or the collector is told why not."""

from __future__ import annotations

import json
import os

import pytest

from gradwatch.agent.probe.order import LoadOrder, OrderFile, generation_of, parse, why_not
from tests.ranks import run_ranks

MODULE = "tests.training.loading"
HALF = "OSError('planted: the disk is gone'); the weights of this rank may be half loaded"
JOINED = "loading in process is off: the model is used under join(), where a rank may run out of data"
OTHER = "another rank holds another order of the same generation"


class Story:
    """What a story's ranks did and journalled; journals of a rank in the order of their beginning."""

    def __init__(self, folder, name, world_size, **environ):
        nodes = [folder / f"node{rank}" for rank in range(world_size)]
        for node in nodes:
            node.mkdir()
        environ["GRADWATCH_CHECKPOINTS_ROOT"] = str(folder / "ckpts")
        results = run_ranks(MODULE, world_size, [name], spool=nodes, **environ)
        self.outputs = [result.output for result in results]
        self.told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]
        self.journals = [self._journals(node) for node in nodes]

    @staticmethod
    def _journals(node):
        journals = [
            [json.loads(line) for line in file.read_text().splitlines()] for file in node.glob("rank*.jsonl")
        ]
        return sorted(journals, key=lambda journal: journal[0]["at"])

    def said(self, rank, kind):
        """All bodies of one kind, over the rank's journals."""
        return [record[kind] for journal in self.journals[rank] for record in journal if kind in record]


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    return Story(tmp_path_factory.mktemp("orders"), "orders", 3)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    policy = '{"on_nonfinite": "skip_step", "max_consecutive": 3}'
    return Story(tmp_path_factory.mktemp("kinds"), "kinds", 2, GRADWATCH_GUARD=policy)


def test_all_ranks_load_in_the_same_iteration_one_after_the_last_has_seen_the_order(orders):
    loads = [[iteration for iteration, _ in told["loads"]] for told in orders.told]
    # Rank 2 sees the second order two iterations late; the last is another one for each rank.
    assert [iterations[:3] for iterations in loads] == [[10, 16, 20]] * 3
    assert sum(len(iterations) - 3 for iterations in loads) <= 1


def test_the_next_iteration_begins_with_what_was_in_the_checkpoint(orders, kinds):
    assert [told["differing"] for told in orders.told] == [[]] * 3
    for told in kinds.told:
        for name in ("guard", "scaler", "powersgd"):
            loads, differing, *_ = told[name]
            assert [iteration for iteration, _ in loads] == [9]
            assert differing == []


def test_a_rank_goes_on_in_a_new_journal_of_the_new_generation(orders):
    for rank in range(3):
        journals = orders.journals[rank]
        hellos = [journal[0]["hello"] for journal in journals]
        assert [hello["generation"] for hello in hellos] == [0, 2, 3]
        assert len({hello["incarnation"] for hello in hellos}) == 3
        assert len({(hello["rank"], hello["pid"], hello["attempt_key"]) for hello in hellos}) == 1
        for journal in journals:
            assert [record["seq"] for record in journal] == list(range(len(journal)))
            assert list(journal[1])[-1] == "model"
            assert list(journal[2])[-1] == "can_load"
        ends = [journal[-1]["loaded"] for journal in journals[:2]]
        assert [(end["order"], end["step"], end["error"]) for end in ends] == [
            ("decision-2", 3, ""),
            ("decision-3", 3, ""),
        ]


def test_the_old_journal_is_that_of_a_process_which_has_ended(orders):
    # Asked by a neighbour after each load.
    assert [told["held"] for told in orders.told] == [[[False, True], [False, False, True]]] * 3


def test_a_rank_that_fails_makes_all_say_so_and_nothing_else_changes(orders):
    assert [orders.said(rank, "loaded")[0]["error"] for rank in range(3)] == [
        "another rank could not load",
        HALF,
        "another rank could not load",
    ]
    assert "planted: the disk is gone" in orders.outputs[1]
    # The save after it is told with the step that it was, whatever the optimizer has loaded.
    assert [save["step"] for save in orders.said(0, "checkpoint")] == [3, 11]


def test_what_cannot_be_obeyed_is_refused(orders):
    refused = [[loaded["error"] for loaded in orders.said(rank, "loaded")][3:] for rank in range(3)]
    for errors in refused:
        assert errors[0] == "the path 'step-3.pt' is not absolute"
        assert "does not lie below" in errors[1] or errors[1] == OTHER
        assert errors[2] == "batches are to be skipped, which only a restarted command is told"
        assert errors[3] in {OTHER, "another rank could not load"}
    assert any("does not lie below" in errors[1] for errors in refused)
    assert any(errors[3] == OTHER for errors in refused)


def test_under_join_it_is_off_on_every_rank(orders):
    for rank in range(3):
        last = orders.said(rank, "loaded")[-1]
        assert (last["order"], last["error"]) == ("decision-8", JOINED)
        assert orders.outputs[rank].count("loading in process is off") == 1


def test_the_guard_counts_from_0(kinds):
    for rank in (0, 1):
        skips = [
            (skip["step"], skip["consecutive"], skip["in_last_1000"]) for skip in kinds.said(rank, "skipped")
        ]
        # Loaded after the third.
        assert skips == [(6, 1, 1), (7, 2, 2), (8, 3, 3), (3, 1, 1)]


def test_what_compression_carried_is_forgotten(kinds):
    for told in kinds.told:
        carried = told["powersgd"][2]
        assert carried[7] > 0
        assert carried[8] == 0, "loaded at the end of the ninth"


def test_without_an_order_it_changes_no_weight(kinds):
    assert [told["idle"] for told in kinds.told] == [True, True]


def test_when_a_rank_leaves_the_agreement_it_is_off_and_the_training_goes_on(kinds):
    for rank in (0, 1):
        assert kinds.told[rank]["left"]
        assert [fault["part"] for fault in kinds.said(rank, "fault")] == ["load"]
        assert kinds.outputs[rank].count("the part 'load' failed") == 1
        last = kinds.said(rank, "loaded")[-1]
        assert last["order"] == "decision-9"
        assert last["error"].startswith("loading in process is off: ")


def test_when_a_rank_does_not_say_how_it_is_off(tmp_path):
    story = Story(tmp_path, "missing", 2)
    assert story.outputs[0].count("the part 'load' failed") == 1
    assert [told["loads"] for told in story.told] == [[], []]
    assert not story.said(0, "can_load")
    assert story.said(0, "loaded")[0]["error"].startswith("loading in process is off: ")


def test_nothing_is_loaded_inside_of_a_backward_pass(tmp_path):
    story = Story(tmp_path, "inside", 1)
    assert story.told[0]["loads"] == []
    assert "inside of a backward pass" in story.said(0, "fault")[0]["error"]
    assert "inside of a backward pass" in story.said(0, "loaded")[0]["error"]


def test_when_a_rank_dies_the_others_end_as_they_would(tmp_path):
    story = Story(tmp_path, "dying", 2)
    assert story.told[0]["ends"] == "with the error of DDP"
    assert story.outputs[0].count("the part 'load' failed") == 1


# ---------------------------------------------------------------------- the order file


def order(**more):
    return {"id": "d", "job": "j", "generation": 3, "action": "ACTION_LOAD", "resume_path": "/c/x"} | more


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"id":',
        json.dumps(order(job="k")),
        json.dumps(order(action="ACTION_STOP")),
        json.dumps(order(generation="three")),
        json.dumps(order(generation=float("inf"))),
        json.dumps(order(resume_step=[])),
    ],
)
def test_what_is_no_order_of_the_job_to_load_is_none(text):
    assert parse(text.encode(), "j") is None


def test_an_order_is_read_as_protobuf_writes_it():
    known = parse(json.dumps(order(resume_step="5000000000", skip_batches=2)).encode(), "j")
    assert known == LoadOrder("d", 3, "/c/x", 5_000_000_000, 2)
    assert generation_of(known.ticket) == 3
    assert parse(json.dumps(order()).encode(), "j").step is None


def test_another_order_is_seen_when_the_file_is_replaced(tmp_path):
    file = OrderFile(tmp_path, "j")
    assert file.look() is None
    seen = []
    for id_ in ("a", "b"):
        (tmp_path / "new").write_text(json.dumps(order(id=id_)))
        (tmp_path / "new").rename(tmp_path / "order.json")
        assert file.look() is file.look()
        seen.append(file.look())
    assert [one.id for one in seen] == ["a", "b"]
    assert seen[0].ticket != seen[1].ticket
    (tmp_path / "order.json").unlink()
    assert file.look() is None


def test_a_path_must_lie_below_the_root_wherever_links_lead(tmp_path):
    root = tmp_path / "ckpts"
    (tmp_path / "elsewhere").mkdir()
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "alias").symlink_to(root)

    def reason(path, below=root):
        return why_not(LoadOrder("d", 1, os.fspath(path), 1, 0), below)

    assert reason(root / "a.pt") is None
    assert reason(tmp_path / "alias" / "a.pt") is None
    assert reason(root / "a.pt", tmp_path / "alias") is None
    assert reason("/anywhere", None) is None
    for path in (root, root / "link" / "a.pt", root / ".." / "b.pt", f"{root}-2/a.pt", "/etc/passwd", ""):
        assert reason(path) is not None
