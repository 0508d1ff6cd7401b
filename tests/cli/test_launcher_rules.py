"""The launcher's deciding parts: pure, so tables."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from pathlib import Path

import pytest

from gradwatch.agent.probe.settings import Settings
from gradwatch.cli.launcher import environment, job_view, report, supervise, watch
from gradwatch.cli.launcher.job_view import JobView
from gradwatch.cli.launcher.watch import Circumstances, Line, Said, Weight

NOW = dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.timezone.utc)


# ---------------------------------------------------------------- the job's name


@pytest.mark.parametrize(
    ("command", "environ", "name"),
    [
        (["torchrun", "--nproc-per-node", "4", "src/train.py", "--lr", "1"], {}, "train-20300102-030405-ab"),
        (["python", "-m", "pkg.train"], {}, "pkg.train-20300102-030405-ab"),
        (["python", "-m", "torch.distributed.run", "-m", "mine"], {}, "mine-20300102-030405-ab"),
        (["/usr/bin/env"], {}, "env-20300102-030405-ab"),
        # what a label, a path or a URL could not hold
        (["my train!.py"], {}, "my-train--20300102-030405-ab"),
        # Slurm's own name is better known to the user
        (["train.py"], {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "llm"}, "llm-7"),
        (["train.py"], {"SLURM_JOB_ID": "7"}, "slurm-7"),
    ],
)
def test_default_job(command, environ, name):
    assert environment.default_job(command, environ, NOW, "ab") == name


# ---------------------------------------------------------------- the command's environment


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        # the user's own choice stands
        ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}),
        # a generation that a supervisor counts is kept
        ({"GRADWATCH_GENERATION": "3"}, {"GRADWATCH_GENERATION": "3"}),
        # but not that of a run around this one
        ({"GRADWATCH_GENERATION": "3", "GRADWATCH_SPOOL": "/outer"}, {"GRADWATCH_GENERATION": "0"}),
        ({"GRADWATCH_JOB": "outer"}, {"GRADWATCH_JOB": "j"}),
    ],
)
def test_environment_of_the_command(environ, expected):
    made = environment.for_command(environ, spool=Path("/spool"), job="j")
    assert expected.items() <= made.items()
    assert made["GRADWATCH_SPOOL"] == "/spool"


@pytest.mark.parametrize("autopsy", [True, False])
def test_the_command_is_told_whether_to_replay(autopsy):
    made = environment.for_command({}, spool=Path("/spool"), job="j", autopsy=autopsy)
    settings = Settings.from_environment(made)
    assert settings is not None
    assert settings.autopsy == autopsy


def test_an_unwatched_command_does_not_write_into_an_outer_runs_spool():
    assert "GRADWATCH_SPOOL" not in environment.for_command(
        {"GRADWATCH_SPOOL": "/outer"}, spool=None, job="j"
    )


def test_our_children_take_nothing_from_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = environment.for_child({"PYTHONPATH": "lib::/abs", "GRADWATCH_HTTP": "x", "PATH": "/bin"})
    assert made == {"PYTHONPATH": f"{tmp_path}/lib:/abs", "PATH": "/bin"}


def test_a_child_calls_the_host_as_the_ranks_do():
    assert environment.for_child({"GRADWATCH_NODE": "a", "GRADWATCH_JOB": "j"}) == {"GRADWATCH_NODE": "a"}


# ---------------------------------------------------------------- what is said

VERDICT = ["Rank 1 was first.", "Rank 0 was clean."]
INCIDENT = {"id": "i", "status": "confirmed", "verdict": VERDICT}
WHOLE = JobView(world_size=2, watched=2)
DECISION = {
    "id": "d",
    "action": "rollback",
    "outcome": "dry_run",
    "reason": "rank 1 was first",
    "effect": "would resume /c",
}


@pytest.mark.parametrize(
    ("view", "lines"),
    [
        # not all ranks are there yet: nothing to say
        (JobView(), []),
        (JobView(world_size=2, watched=1), []),
        (WHOLE, [Line(Weight.NOTE, "watching 2 of 2 ranks")]),
        # a suspicion is not told, a verdict is
        (JobView(incidents=({**INCIDENT, "status": "suspected"},)), []),
        (JobView(incidents=(INCIDENT,)), [Line(Weight.VERDICT, f"incident i: {' '.join(VERDICT)}")]),
        # processes that train unwatched, one line per reason
        (
            JobView(unwatched=((1, "FSDP1"), (0, "FSDP1"), (None, "alone"))),
            [
                Line(Weight.WARNING, "NOT WATCHED: ranks 0, 1: FSDP1"),
                Line(Weight.WARNING, "NOT WATCHED: a process: alone"),
            ],
        ),
        # a decision is told once; not one to do nothing, nor what the launcher tells as it does it
        (
            JobView(decisions=(DECISION,)),
            [Line(Weight.VERDICT, "decision d: rollback (dry_run): rank 1 was first; would resume /c")],
        ),
        (JobView(decisions=({**DECISION, "action": "ignore"},)), []),
        (JobView(decisions=({**DECISION, "outcome": "pending"},)), []),
        # what the collector says of the policy, and of the way back
        (
            JobView(policy_problems=("p.yaml:2: x",), threats=("keep more",)),
            [
                Line(Weight.WARNING, "the policy file has changed and is not in force: p.yaml:2: x"),
                Line(Weight.WARNING, "keep more"),
            ],
        ),
        (
            JobView(faults={"scan": 2}),
            [
                Line(
                    Weight.WARNING,
                    "a part of the probe failed and switched itself off: scan; "
                    "the training goes on without it",
                )
            ],
        ),
        (
            JobView(dropped={"duplicate_rank": 4}),
            [
                Line(
                    Weight.WARNING,
                    "two live processes claim the same rank: the first stays watched, "
                    "the other is only counted",
                )
            ],
        ),
    ],
)
def test_news_is_told_once(view, lines):
    said, told = watch.news(Said(), view)
    assert told == lines
    assert watch.news(said, view)[1] == []


def test_a_job_without_end_of_incidents_does_not_fill_the_log():
    most = watch.MAX_INCIDENTS_SAID
    incidents = tuple({**INCIDENT, "id": f"i{number}"} for number in range(most + 50))
    warn = {**DECISION, "action": "warn", "outcome": "recorded"}
    said, told = watch.news(Said(), JobView(incidents=incidents[:most]))
    assert len(told) == most
    said, (told,) = watch.news(said, JobView(incidents=incidents, decisions=(warn,)))
    assert "`gradwatch incidents`" in told.text
    # What is done with the job is told all the same.
    _, told = watch.news(said, JobView(incidents=incidents, decisions=({**DECISION, "id": "e"},)))
    assert [line.text.split()[2] for line in told] == ["rollback"]


@pytest.mark.parametrize(
    ("theirs", "ours", "differs"),
    [("a", "b", True), ("a", "a", False), (None, "b", False), ("a", None, False)],
)
def test_another_policy_in_force_is_said(theirs, ours, differs):
    _, lines = watch.news(Said(), JobView(policy_hash=theirs), ours)
    assert [line.weight for line in lines] == [Weight.WARNING] * differs


# ---------------------------------------------------------------- how much was watched

NOTHING = Circumstances(
    view=JobView(), autoloaded=False, autoload_off=False, local_ranks={}, own_collector=True
)


@pytest.mark.parametrize(
    ("changes", "watched", "world_size", "causes"),
    [
        ({"view": WHOLE}, 2, 2, []),
        # nobody loaded the probe: why that may be
        ({}, 0, None, ["no process loaded gradwatch with torch"]),
        ({"autoload_off": True}, 0, None, ["TORCH_DEVICE_BACKEND_AUTOLOAD=0"]),
        # it was loaded and found no model
        ({"autoloaded": True}, 0, None, ["no process wrapped a model", "an optimizer of torch's"]),
        # the probe said why itself
        ({"view": JobView(unwatched=((0, "FSDP1"),)), "autoloaded": True}, 0, None, ["rank 0: FSDP1"]),
        # some ranks only: on other nodes without a common collector?
        ({"view": JobView(world_size=4, watched=2)}, 2, 4, ["2 of 4 ranks", "same --collector"]),
        ({"view": JobView(world_size=4, watched=2), "own_collector": False}, 2, 4, ["2 of 4 ranks"]),
        (
            {"view": JobView(world_size=2, watched=1, unwatched=((1, "alone"),))},
            1,
            2,
            ["1 of 2 ranks", "rank 1: alone"],
        ),
        # the collector never answered; the journals tell who was there
        ({"view": None, "local_ranks": {0: 2, 1: 2}}, 2, 2, ["the collector never answered"]),
        # there was nowhere to write
        ({"spool_error": "cannot write /x"}, 0, None, ["cannot write /x"]),
    ],
)
def test_coverage(changes, watched, world_size, causes):
    covered = watch.coverage(dataclasses.replace(NOTHING, **changes))
    assert (covered.watched, covered.world_size) == (watched, world_size)
    assert bool(covered.warnings) == bool(causes)
    for cause in causes:
        assert any(cause in warning for warning in covered.warnings)
    assert covered.complete == (not causes)


def test_the_last_line_gives_ranks_incidents_overhead():
    view = dataclasses.replace(WHOLE, incidents=(INCIDENT,), overhead={"ratio": 0.0123})
    covered = watch.Coverage(2, 2, [])
    assert (
        watch.last_line("j", covered, view)
        == "job j ended: 2 of 2 ranks watched, 1 incident, overhead 1.23% of the step time"
    )
    assert "incidents unknown" in watch.last_line("j", covered, None)
    assert "overhead unknown" in watch.last_line("j", covered, WHOLE)


# ---------------------------------------------------------------- the status document


def document(**changes) -> bytes:
    fields = {
        "run": 1,
        "generation": 0,
        "attempt": 1,
        "world_size": 2,
        "ranks_watched": 2,
        "unwatched": [{"rank": 1, "reason": "r"}],
        "dropped": {},
        "faults": {},
        "incidents": [{"id": "old", "run": 0}, {"id": "new", "run": 1}],
        "incidents_left_out": 0,
        "decisions": [],
        "overhead": {"ratio": None},
    }
    return json.dumps(fields | changes).encode()


def test_what_a_status_document_says_of_the_policy():
    policy = {"hash": "abc", "mode": "enforce", "problems": ["p.yaml:2: x"]}
    view = job_view.parse(document(policy=policy, warnings=["keep more"]))
    assert view is not None
    assert (view.policy_hash, view.policy_problems, view.threats) == ("abc", ("p.yaml:2: x",), ("keep more",))
    # none in force, and a collector that says nothing of policies
    for earlier in (document(policy=None), document()):
        view = job_view.parse(earlier)
        assert view is not None
        assert (view.policy_hash, view.policy_problems, view.threats) == (None, (), ())


def test_a_status_document_is_read():
    view = job_view.parse(document())
    assert view is not None
    assert (view.generations, view.attempts, view.watched, view.unwatched) == (1, 2, 2, ((1, "r"),))
    # incidents of an earlier run of the same name are not this run's
    assert [incident["id"] for incident in view.incidents] == ["new"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"job": "x"}', document(unwatched=[3])])
def test_what_is_no_status_document_is_none(data):
    assert job_view.parse(data) is None


# ---------------------------------------------------------------- restarts


def test_waits_grow_and_a_healthy_life_resets_them():
    backoff = supervise.Backoff()
    waits = []
    for now in range(100, 110):
        backoff = backoff.after_death(started=now, now=now)
        waits.append(backoff.not_before - now)
    assert waits[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert waits[-1] == supervise.LONGEST_WAIT_SECONDS
    assert backoff.after_death(started=0, now=1000).not_before == pytest.approx(1000.1)


def test_a_dead_child_is_started_again_when_it_is_wanted():
    exits: dict[int, int] = {}
    pids = iter(range(1, 100))
    child = supervise.Supervised(lambda: next(pids), exits.get)
    child.tick(0.0, wanted=True)
    assert child.pid == 1
    exits[1] = -9
    child.tick(1.0, wanted=True)
    assert (child.pid, child.last_exit, child.deaths) == (None, -9, 1)
    child.tick(1.2, wanted=False)
    assert child.pid is None
    child.tick(1.2, wanted=True)
    assert child.pid == 2


def test_a_child_that_cannot_be_started_is_tried_again_later():
    def fail() -> int:
        raise OSError("no")

    child = supervise.Supervised(fail, lambda _: None)
    child.tick(0.0, wanted=True)
    child.tick(0.01, wanted=True)
    assert (child.pid, child.deaths) == (None, 1)


# ---------------------------------------------------------------- the report


def test_where_a_controller_took_the_orders_the_last_rollback_says_what_was_resumed():
    decision = {"action": "rollback", "outcome": "performed", "in_process": False, "generation": 1}
    at_5, at_9 = ({"path": f"/c/{step}", "step": step} for step in (5, 9))
    newer = {**decision, "generation": 2, "checkpoint": at_9}
    others = [{**newer, "outcome": "refused"}, {**newer, "action": "halt", "checkpoint": None}]
    view = dataclasses.replace(WHOLE, decisions=({**decision, "checkpoint": at_5}, newer, *others))
    assert report.resumed_by_controller(view) == {**at_9, "generation": 3, "honoured": None}
    assert report.resumed_by_controller(WHOLE) is None


@pytest.mark.parametrize(
    ("said", "honoured"),
    [
        ({"path": "/c/9", "generation": 3, "honoured": False}, False),
        ({"path": "/c/9", "generation": 3, "honoured": True}, True),
        ({"path": "/c/9", "generation": 3, "honoured": None}, None),
        # Of another generation, from a collector of an earlier version, or of a later one.
        ({"path": "/c/9", "generation": 2, "honoured": False}, None),
        (None, None),
        ({"generation": 3, "honoured": "partly"}, None),
        (["?"], None),
    ],
)
def test_the_ranks_say_whether_a_resume_was_honoured(said, honoured):
    view = job_view.parse(document(resume=said))
    assert view.has_resumed(3) is honoured
    at_9 = {"path": "/c/9", "step": 9}
    decision = {"action": "rollback", "outcome": "performed", "in_process": False, "generation": 2}
    view = dataclasses.replace(view, decisions=({**decision, "checkpoint": at_9},))
    assert report.resumed_by_controller(view) == {**at_9, "generation": 3, "honoured": honoured}


def test_an_incidents_line_says_first_what_happened():
    line = watch.verdict_line({**INCIDENT, "title": "log of 0 at model.py:33, rank 1 on gpu-07, step 24"})
    assert line == f"incident i: log of 0 at model.py:33, rank 1 on gpu-07, step 24. {' '.join(VERDICT)}"


def test_the_report_holds_the_contracts_fields():
    view = dataclasses.replace(WHOLE, incidents=(INCIDENT,))
    ending = report.Ending(0, report.EndedBy.COMMAND)
    made = report.build("j", ending, watch.Coverage(2, 2, []), view, ["w"])
    assert made == {
        "job": "j",
        "exit_code": 0,
        "ended_by": "command",
        "generations": 1,
        "attempts": 1,
        "ranks_watched": 2,
        "world_size": 2,
        "incidents": [INCIDENT],
        "incidents_left_out": 0,
        "decisions": [],
        "exclude_node": None,
        "resume": None,
        "overhead": {},
        "warnings": ["w"],
    }
