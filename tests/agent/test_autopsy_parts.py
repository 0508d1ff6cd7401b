"""The parts of an autopsy, one by one: provenance, capsules, the child, the shelf."""

from __future__ import annotations

import collections
import math
import os
import random
import signal
import stat
import time
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.agent.probe import spool
from gradwatch.agent.probe.autopsy import handover
from gradwatch.agent.probe.autopsy.capsule import Capsule, Capsules, RandomState
from gradwatch.agent.probe.autopsy.child import ChildError, in_child
from gradwatch.agent.probe.autopsy.handover import Handover, NoShardsError
from gradwatch.agent.probe.autopsy.provenance import Event, Given, on_purpose, origin_of
from gradwatch.agent.probe.autopsy.shelf import NotShareable, Shelf, read_shards
from gradwatch.agent.probe.autopsy.values import FINITE, Kinds, described, kinds_of
from gradwatch.agent.sidecar.cleanup import remove_spool

NAN, POSITIVE, NEGATIVE = Kinds(nan=True), Kinds(positive=True), Kinds(negative=True)
MASK = Given("constant", NEGATIVE)
WEIGHT = Given("parameter", NEGATIVE)


# ---------------------------------------------------------------- provenance


@pytest.mark.parametrize(
    ("gave", "bad", "numbers", "masked"),
    [
        # masked_fill(scores, mask, -inf)
        (NEGATIVE, [], NEGATIVE, True),
        # the scores and a mask that is a buffer, added
        (NEGATIVE, [MASK], FINITE, True),
        # the softmax of a row that is masked wholly
        (NAN, [MASK], FINITE, False),
        # an overflow beside a mask
        (NEGATIVE | POSITIVE, [MASK], FINITE, False),
        # log(0)
        (NEGATIVE, [], FINITE, False),
        # fill_(nan) is no mask
        (NAN, [], NAN, False),
        # infinite weights are no mask
        (NEGATIVE, [WEIGHT], FINITE, False),
    ],
)
def test_infinities_that_are_there_on_purpose(gave, bad, numbers, masked):
    assert on_purpose(gave, bad, numbers) == masked


def event(index, *bad, masked=False):
    return Event(index, NAN, bad, masked, None)


def test_the_origin_is_the_first_operator_that_the_result_depends_on():
    unused = event(1)
    log, exp = event(2), event(3)
    both = event(5, event(4, log, MASK), exp)
    assert origin_of(both) is log
    assert origin_of(event(6, exp, unused, masked=False)) is unused
    # A mask is passed over on the way back, and what makes NaN of it is the origin.
    softmax = event(8, event(7, MASK, masked=True))
    assert origin_of(event(9, softmax)) is softmax


def test_without_an_operator_it_is_what_was_bad_from_the_start():
    assert origin_of(event(2, event(1, WEIGHT))) is WEIGHT
    # Running statistics that were spoilt by the same pass do not hide who spoilt them.
    log = event(1)
    assert origin_of(event(2, Given("constant", NAN), log)) is log


def test_kinds_and_ranges_of_values():
    assert kinds_of(torch.tensor([math.nan, math.inf, 1.0])) == NAN
    assert kinds_of(torch.tensor([math.inf, 1.0, -math.inf])) == POSITIVE | NEGATIVE
    assert kinds_of(torch.full((4,), 3e38)) == FINITE, "only the sum overflows"
    assert kinds_of(-math.inf) == NEGATIVE
    assert kinds_of(torch.tensor([1, 2])) == FINITE
    assert (NAN | POSITIVE).value == "VALUE_NAN"
    assert described(torch.tensor([[1.0, math.inf, -2.0]])) == {
        "dtype": "float32",
        "shape": [1, 3],
        "nonfinite": 1,
        "min": -2.0,
        "max": 1.0,
    }
    assert described(torch.tensor([3, 5]))["max"] == 5.0
    assert described(torch.empty(0)) == {"dtype": "float32", "shape": [0], "nonfinite": 0}
    masked = torch.tensor([[1.0, -math.inf], [-math.inf, -math.inf]])
    assert described(masked, 1) == {**described(masked), "empty_rows": 1}
    assert described(masked, 0)["empty_rows"] == 1
    assert described(masked[:1], -1)["empty_rows"] == 0
    assert described(math.nan) == {"dtype": "float", "shape": [], "nonfinite": 1}


# ---------------------------------------------------------------- capsules


def begin(capsules, *tensors):
    return capsules.begin(tensors, {}, tensors, None, tuple)


def test_older_capsules_make_room_and_a_large_one_is_not_kept():
    capsules = Capsules(cap_bytes=100)
    first, second = begin(capsules, torch.zeros(10)), begin(capsules, torch.zeros(10))
    assert first.why_not() == second.why_not() == ""
    third = begin(capsules, torch.zeros(10))
    assert "took its place" in first.why_not()
    assert first.nbytes == 0
    assert second.why_not() == third.why_not() == ""
    large = begin(capsules, torch.zeros(26))
    assert "at most" in large.why_not()
    assert second.why_not() == "", "what is not kept displaces nothing"
    # The gradient at the output counts, too.
    capsules.entered(third, [(0, 0)], [torch.zeros(20)])
    assert "at most" in third.why_not()


def test_a_capsule_whose_output_takes_too_much_room_keeps_nothing():
    values = torch.ones(10)
    capsules = Capsules(cap_bytes=values.nbytes + 8)
    capsule = capsules.begin((values,), {}, [values], None, tuple)
    capsules.left(capsule, [torch.full((4,), float("nan"))], False)
    assert "at most" in capsule.lost
    assert (capsule.output, capsule._versions, capsule.nbytes) == (None, [], 0)


def test_a_capsule_that_is_gone_takes_no_room():
    capsules = Capsules(cap_bytes=100)
    first = begin(capsules, torch.zeros(20))
    del first
    second = begin(capsules, torch.zeros(20))
    assert second.why_not() == ""
    second.release()
    third = begin(capsules, torch.zeros(20))
    assert third.why_not() == ""


def test_capsules_that_are_over_are_forgotten():
    capsules = Capsules(cap_bytes=1000)
    for _ in range(500):
        begin(capsules, torch.zeros(1)).release()
    assert len(capsules._alive) < 100
    kept = [begin(capsules, torch.zeros(10)) for _ in range(25)]
    assert all(one.why_not() == "" for one in kept)
    begin(capsules, torch.zeros(10))
    assert [one.why_not() == "" for one in kept] == [False] + [True] * 24


def test_what_was_changed_in_place_is_noticed():
    capsules = Capsules()
    values, gradient = torch.zeros(3), torch.zeros(3)
    capsule = begin(capsules, values)
    capsules.entered(capsule, [(0, 0)], [gradient])
    assert capsule.why_not() == ""
    gradient.add_(1)
    assert "a gradient at the output was changed in place" in capsule.why_not()
    other = begin(capsules, values)
    capsules.entered(other, [(0, 0)], [gradient])
    capsules.entered(other, [(0, 0)], [gradient])
    assert "more than once" in other.why_not()


def test_weights_that_were_updated_are_noticed():
    weight = torch.zeros(3)
    capsule = Capsules().begin((), {}, [], None, lambda: (weight._version,))
    weight.add_(1)
    assert "the parameters were changed" in capsule.why_not()


# ---------------------------------------------------------------- the child


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_child_computes_with_the_threads_that_it_is_given(threads):
    """Sums of many rows are split among them, and come out otherwise with another number."""
    values = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    norm = torch.nn.LayerNorm(64)

    def gradients():
        results = torch.autograd.grad(norm(values).square().sum(), list(norm.parameters()))
        return {"sums": [gradient.view(torch.int32).sum().item() for gradient in results]}

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Doubling():
            expected = gradients()
            assert in_child(gradients, seconds=20, threads=threads) == expected
        with pytest.raises(ChildError, match="ended with 1"):
            in_child(lambda: 1 // 0, seconds=20, threads=threads)
    finally:
        torch.set_num_threads(before)


class Doubling(TorchDispatchMode):
    """What the process runs under, the child runs under."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.pow.Tensor_Scalar else result


def test_a_child_gives_its_word_and_leaves_nothing_behind():
    values = torch.zeros(3)

    def change():
        values.add_(1)
        print("noise")
        return {"sum": values.sum().item(), "threads": torch.get_num_threads(), "pid": os.getpid()}

    told = in_child(change, seconds=20)
    assert told["sum"] == 3.0
    assert told["threads"] == 1
    assert told["pid"] != os.getpid()
    assert values.sum().item() == 0.0
    with pytest.raises(ChildProcessError):
        os.waitpid(told["pid"], os.WNOHANG)


def _endless():
    while True:
        pass


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (_endless, "took too long"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"),
        (lambda: {"set": {1}}, "ended with 1"),
        (lambda: os._exit(0), "without a word"),
    ],
)
def test_a_child_that_fails_says_why(call, why):
    with pytest.raises(ChildError, match=why):
        in_child(call, seconds=0.5 if call is _endless else 20)


@pytest.fixture
def stillborn():
    """So many of the next children do not come to life."""
    left = [0]

    def count():
        left[0] -= 1

    def hang():
        while left[0] >= 0:
            time.sleep(60)

    # There is no way to take it back: it hangs none of those that no test has asked for.
    os.register_at_fork(before=count, after_in_child=hang)
    yield left
    left[0] = 0


def test_a_child_that_does_not_come_to_life_is_made_again(stillborn):
    stillborn[0] = 2
    assert in_child(lambda: {"a": 1}, seconds=60) == {"a": 1}
    assert stillborn[0] == -1


def test_children_are_not_waited_for_for_ever(stillborn):
    stillborn[0] = 1000
    with pytest.raises(ChildError, match="came to life"):
        in_child(lambda: {"a": 1}, seconds=1)


# ---------------------------------------------------------------- the shelf


def capsule_of(*args):
    rng = RandomState(torch.get_rng_state(), python=random.getstate())
    entering = {0: torch.ones(2)}
    return Capsule(args, {"scale": 2.0}, rng, (True, torch.bfloat16), entering=entering, threads=3)


def test_a_capsule_is_taken_by_so_many_and_only_by_its_round(tmp_path):
    owner, other = Shelf(tmp_path, "abc"), Shelf(tmp_path, "abc")
    whole = torch.arange(1000.0)
    owner.put((0, 7), 3, capsule_of([whole[:3]]), {"microbatch": 1})
    (file,) = (tmp_path / spool.CAPSULES).iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_size < 16_000, "not the whole of which it is a part"
    assert other.take((0, 8)) is None
    assert Shelf(tmp_path, "abd").take((0, 7)) is None
    others = [Shelf(tmp_path, "abc") for _ in range(3)]
    for taken in (one.take((0, 7), most=2) for one in others[:2]):
        assert taken is not None
        assert (taken.rank, taken.about) == (3, {"microbatch": 1})
        capsule = taken.capsule
        assert torch.equal(capsule.args[0][0], whole[:3])
        assert capsule.kwargs == {"scale": 2.0}
        assert capsule.autocast == (True, torch.bfloat16)
        assert torch.equal(capsule.entering[0], torch.ones(2))
        assert capsule.threads == 3
        assert capsule.rng.python == random.getstate()
    assert others[2].take((0, 7), most=2) is None
    for one in (owner, *others):
        one.clear()
    assert list((tmp_path / spool.CAPSULES).iterdir()) == []


def test_what_nobody_takes_is_cleared_away(tmp_path):
    owner, next_attempt = Shelf(tmp_path, "abc"), Shelf(tmp_path, "abd")
    owner.put((0, 7), 0, capsule_of(), {})
    owner.put((0, 9), 0, capsule_of(), {})
    assert len(list((tmp_path / spool.CAPSULES).iterdir())) == 1
    next_attempt.put((0, 0), 0, capsule_of(), {})
    assert [path.name for path in (tmp_path / spool.CAPSULES).iterdir()] == ["abd-0-0-0.capsule"]
    owner.clear()
    remove_spool(tmp_path)
    assert not tmp_path.exists()


def test_what_would_need_code_to_be_read_back_is_not_handed_on(tmp_path):
    with pytest.raises(NotShareable, match="OrderedDict"):
        Shelf(tmp_path, "abc").put((0, 0), 0, capsule_of(collections.OrderedDict()), {})
    assert not (tmp_path / spool.CAPSULES).exists()


# ---------------------------------------------------------------- shards

ROUND = (0, 7)


@dataclass
class Held:
    """What one rank holds, as `Shards` says it."""

    peers: list[int]
    value: float
    ranks: tuple[int, ...] = (0, 1, 2)

    def held(self):
        return [torch.full((2, 3), self.value), torch.empty(0)]


def ranks_of(folder, *, here=(0, 1, 2)):
    """The handovers of three ranks, of which some are on this host."""
    for rank in here:
        (folder / spool.claim_filename(rank)).touch()
    return [Handover(Shelf(folder, "abc"), folder, rank) for rank in range(3)]


def test_shards_are_laid_down_when_another_rank_has_asked(tmp_path):
    asker, other, third = ranks_of(tmp_path)
    shelf = Shelf(tmp_path, "abc")
    assert other.lay_down(ROUND, Held([0, 1, 2], 1.0)) is None
    shelf.ask(ROUND, 0, (0, 1, 2))
    shelf.ask(ROUND, 2, (0, 1, 2))
    assert other.lay_down((0, 8), Held([0, 1, 2], 1.0)) is None, "for another round"
    assert other.lay_down(ROUND, Held([0, 1], 1.0, ranks=(0, 1))) is None, "for a model of other ranks"
    assert other.lay_down(ROUND, Held([0, 1, 2], 1.0)) == 0, "the first one is known"
    assert third.lay_down(ROUND, Held([0, 1, 2], 2.0)) == 0
    for file in (tmp_path / spool.CAPSULES).iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with asker.own(ROUND, Held([0, 1, 2], 0.0)) as files:
        # Whoever sees that they are open may delete its own.
        other.wait_until_opened(ROUND)
        for file in (tmp_path / spool.CAPSULES).iterdir():
            file.unlink()
        shards = read_shards(files)
    assert {rank: held[0].unique().tolist() for rank, held in shards.items()} == {
        0: [0.0],
        1: [1.0],
        2: [2.0],
    }
    assert all(held[1].numel() == 0 for held in shards.values())


def test_only_one_other_rank_replays_with_what_the_asker_has_laid_down(tmp_path):
    asker, other, _ = ranks_of(tmp_path)
    own, another = Shelf(tmp_path, "abc"), Shelf(tmp_path, "abc")
    own.ask(ROUND, 0, (0, 1, 2))
    assert other.lay_down(ROUND, Held([1], 1.0)) == 0
    with asker.own(ROUND, Held([0], 0.0)), other.others(ROUND, Held([1], 1.0), asker=0) as files:
        assert [*files] == [1], "what the asker holds is not a part of its own"
    assert own.claim(ROUND)
    assert not another.claim(ROUND)
    assert another.claim(ROUND, most=2)
    assert another.claim((0, 8))


def test_shards_on_other_hosts_are_not_waited_for(tmp_path):
    (asker, *_) = ranks_of(tmp_path, here=(0, 2))
    with (
        pytest.raises(NoShardsError, match=r"on other hosts.* rank 1$"),
        asker.own(ROUND, Held([0, 1, 2], 0.0)),
    ):
        pass


def test_shards_that_do_not_come_are_waited_for_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "SECONDS", 0.01)
    asker, other, _ = ranks_of(tmp_path)
    with (
        pytest.raises(NoShardsError, match="ranks 0, 1, 2 hold were not all there"),
        asker.own(ROUND, Held([0, 1, 2], 0.0)),
    ):
        pass
    other.wait_until_opened(ROUND)
    other.wait_until_opened((0, 8))


def test_shards_that_are_not_needed_after_all_are_not_waited_for(tmp_path):
    asker, other, _ = ranks_of(tmp_path)
    asker.ask(ROUND, Held([0, 1, 2], 0.0))
    asker.call_off(ROUND)
    assert other.lay_down(ROUND, Held([0, 1, 2], 1.0)) == 0
    other.wait_until_opened(ROUND)


def test_a_shelf_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / spool.CAPSULES).touch()
    (asker, *_) = ranks_of(tmp_path)
    with pytest.raises(NoShardsError, match="could not be handed over"), asker.own(ROUND, Held([0], 0.0)):
        pass
