"""A process that trains alone is watched: the same events, from gradient hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from gradwatch.agent.probe.owners import names_of
from tests.agent.test_bitwise import same_bits
from tests.agent.test_guard import POLICY, comparable
from tests.ranks import REPOSITORY
from tests.training.single import BAD_STEP, CASES, STEPS

# Of each case what is to be told: micro-batch, phase, first parameter, its place in the backward pass.
TOLD = {
    "backward": (0, "PHASE_BACKWARD", "first.bias", 2),
    "backward-kept": (0, "PHASE_BACKWARD", "first.bias", 2),
    # The loss was bad, and nobody has seen what went into the model.
    "input": (1, None, "last.bias", 0),
    "last-micro-batch": (2, "PHASE_BACKWARD", "first.bias", 2),
    "parameter": (0, "PHASE_PARAMETER", "last.bias", 0),
    "overflow": (0, "PHASE_BACKWARD", "last.bias", 0),
    "scaled": (0, "PHASE_BACKWARD", "first.bias", 2),
    # After the clipping all would be NaN.
    "clipped": (0, "PHASE_BACKWARD", "first.bias", 2),
    "closure": (0, "PHASE_BACKWARD", "first.bias", 2),
    "split": (0, "PHASE_BACKWARD", "first.bias", 2),
    "fused": (0, "PHASE_BACKWARD", "first.bias", 2),
    "complex": (0, "PHASE_BACKWARD", "first.bias", 2),
    "explicit": (0, "PHASE_BACKWARD", "first.bias", 2),
    "compiled": (0, "PHASE_BACKWARD", None, None),
    "reentrant": (1, "PHASE_BACKWARD", "first.bias", 2),
    "recomputed": (0, "PHASE_BACKWARD", "first.bias", 2),
    # The generator trains on while the judge's bad gradients linger: that is no news.
    "judge": ("judge", "PHASE_BACKWARD", "judge.2.bias", 0),
    "generator": ("generator", "PHASE_BACKWARD", "generator.bias", 4),
    "no-module": (0, "PHASE_BACKWARD", "parameter 0 of group 0", 1),
    # Nobody has seen them arrive.
    "assigned": (0, None, "bias", None),
    "copied": (0, "PHASE_BACKWARD", "first.bias", 2),
    "fails": (0, "PHASE_BACKWARD", "first.bias", 2),
}
EXCUSED = {"overflow", "scaled"}


def train(folder, fault, *, look="host", watched=True, **environment):
    """The states at the end, by case, and the records of the journal."""
    spool = folder / f"{fault}-{look}-{watched}"
    spool.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment}
    if watched:
        env |= {"GRADWATCH_SPOOL": str(spool)}
    output = spool / "states"
    command = [sys.executable, "-m", "tests.training.single", str(output), fault, look]
    done = subprocess.run(
        command, env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gradwatch:" not in done.stderr
    records = [
        json.loads(line) for path in spool.glob("rank*.jsonl") for line in path.read_text().splitlines()
    ]
    return torch.load(output, weights_only=False), records


def differing(one, other):
    return [name for name in one if not same_bits(comparable(one[name]), comparable(other[name]))]


def test_weights_are_those_of_an_unwatched_run(tmp_path):
    without, nothing = train(tmp_path, "none", watched=False)
    with_us, records = train(tmp_path, "none")
    assert nothing == []
    assert differing(without, with_us) == []
    hello = records[0]["hello"]
    assert (hello["rank"], hello["world_size"], hello["framework"]) == (0, 1, "single")
    assert not any("nonfinite" in record or "fault" in record for record in records)
    assert len([record for record in records if "model" in record]) >= len(CASES)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    return train(tmp_path_factory.mktemp("hand"), "by-hand", watched=False)[0]


@pytest.mark.parametrize("look", ["host", "device"])
def test_what_is_told_and_that_the_guard_is_as_a_careful_hand(look, by_hand, tmp_path):
    assert [*TOLD] == [*CASES]
    states, records = train(tmp_path, "guarded", look=look, GRADWATCH_GUARD=POLICY)
    assert differing(by_hand, states) == []

    bad = [record["nonfinite"] for record in records if "nonfinite" in record]
    assert [json.loads(one["batch"])[0] for one in bad] == [*CASES], "one of each case"
    for place, one in enumerate(bad):
        case, part = json.loads(one["batch"])
        batch, phase, parameter, position = TOLD[case]
        first = one["gradients"][0]
        assert one["step"] == place * STEPS + BAD_STEP, case
        assert one["source"] == "gradient"
        assert (part, one.get("phase")) == (batch, phase), case
        assert one.get("loss_scale_overflow", False) == (case in EXCUSED), case
        assert one["microbatch"] == (batch if isinstance(batch, int) else 0) + (case == "fails"), case
        if parameter is not None:
            assert (first["parameter"], first.get("backward_position")) == (parameter, position), case
        assert first["value"] == "VALUE_NAN" or case == "overflow"
        assert ("count" in first) == (look == "host")
    skipped = [record["skipped"]["step"] for record in records if "skipped" in record]
    assert skipped == [one["step"] for one, case in zip(bad, CASES, strict=True) if case not in EXCUSED]


# ---------------------------------------------------------------- who becomes a rank

SCRIPT = """
import os, torch, torch.distributed as dist
from torch import nn
from gradwatch.agent import watch
module = nn.Linear(2, 1)
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
"""
GOOD = "module(torch.ones(1, 2)).sum().backward()\n"
BAD = "(module(torch.ones(1, 2)) * float('nan')).sum().backward()\n"
STEP = "optimizer.step()\n"
WRAP = """
os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0', RANK='0', WORLD_SIZE='1')
dist.init_process_group('gloo')
module = nn.parallel.DistributedDataParallel(module)
"""
HOOK = "module.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())\n"
HEARD = ["hello", "model", "nonfinite"]
# name: (script, WORLD_SIZE, what is journalled)
RANKS = {
    "it never trains": (GOOD, "", []),
    "its first gradient is bad": (BAD, "", HEARD),
    "it trains": (BAD + STEP, "", HEARD),
    "one of several, that wraps nothing": (BAD + STEP, "4", ["unwatched"]),
    "a wrapped model takes over, and what was before it is forgotten": (GOOD + WRAP + BAD + STEP, "", HEARD),
    "also from one that was watched": (GOOD + STEP + WRAP + BAD + STEP, "", ["hello", "model", *HEARD[1:]]),
    "it steps inside of a backward pass": (HOOK + BAD, "", ["unwatched", *HEARD]),
    "the script names it": ("assert watch(module).active", "", HEARD[:2]),
    "one of several, that is named": ("assert not watch(module).active", "2", []),
}
FORK = """
import json, os, pathlib, sys
import torch
from gradwatch.agent.probe.activate import activate
folder, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for place, (script, world_size) in enumerate(cases):
    spool = folder / str(place)
    spool.mkdir()
    if os.fork() == 0:
        os.dup2(os.open(spool / "said", os.O_CREAT | os.O_WRONLY), 2)
        os.environ.update(GRADWATCH_SPOOL=str(spool), WORLD_SIZE=world_size)
        activate()
        exec(script)
        os._exit(0)
    assert os.wait()[1] == 0, (spool / "said").read_text()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Of each of RANKS, the records of its journals and what it said."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    cases = json.dumps([(SCRIPT + script, world_size) for script, world_size, _ in RANKS.values()])
    subprocess.run([sys.executable, "-c", FORK, str(folder), cases], env=env, timeout=120, check=True)
    told = {}
    # Rank 0 of a job that comes later on this node finds its place free.
    assert {path.name for path in folder.glob("[0-3]/*.claim")} == {"alone.claim"}
    for place, name in enumerate(RANKS):
        journals = sorted((folder / str(place)).glob("rank*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
        lines = [line for path in journals for line in path.read_text().splitlines()]
        told[name] = [json.loads(line) for line in lines], (folder / str(place) / "said").read_text()
    return told


@pytest.mark.parametrize("name", RANKS)
def test_who_becomes_a_rank(ranks, name):
    records, said = ranks[name]
    known = {"unwatched", *HEARD}
    assert [kind for record in records for kind in record if kind in known] == RANKS[name][2]
    assert ("gradwatch:" in said) == ("that is named" in name), said
    source = "ddp-bucket" if WRAP in RANKS[name][0] else "gradient"
    assert all(record["nonfinite"]["source"] == source for record in records if "nonfinite" in record)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("one of several, that wraps nothing", "no torch.distributed process group was made"),
        ("it steps inside of a backward pass", "SGD steps inside of the backward pass"),
    ],
)
def test_what_is_not_watched_is_said(ranks, name, why):
    assert why in ranks[name][0][0]["unwatched"]["reason"]
    assert "watch() takes the DistributedDataParallel instance" in ranks["one of several, that is named"][1]


# ---------------------------------------------------------------- names


def named(optimizers, *said):
    parameters = [
        one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]
    ]
    names = names_of(optimizers, parameters, said)
    return names.module_class, [info.name for _, info in names.parameters]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)


def test_parameters_have_the_names_of_the_outermost_module_that_owns_them():
    pair = Pair()
    pair.other.weight = pair.one.weight
    assert named([torch.optim.SGD(pair.parameters())]) == ("Pair", ["one.weight"])


def test_of_several_modules_each_has_its_class_before_it():
    pairs = Pair(), Pair(), nn.Linear(1, 1, bias=False)
    optimizers = [torch.optim.SGD(pair.parameters()) for pair in pairs]
    module_class, names = named(optimizers, *pairs)
    assert module_class == "Pair, Pair 2, Linear"
    assert names == [
        *("Pair.one.weight", "Pair.other.weight", "Pair 2.one.weight", "Pair 2.other.weight"),
        "Linear.weight",
    ]


def test_what_no_module_owns_is_named_by_its_place():
    free = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": free[:1]}, {"params": free[1:]}])
    assert named([optimizer])[1] == [
        f"parameter {place}" for place in ("0 of group 0", "0 of group 1", "1 of group 1")
    ]


def test_a_module_that_is_not_made_yet_is_passed_over():
    unborn = Pair.__new__(Pair)
    linear = nn.Linear(1, 1)
    assert named([torch.optim.SGD(linear.parameters())])[1] == ["weight", "bias"]
    del unborn
