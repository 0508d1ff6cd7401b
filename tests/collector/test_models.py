"""Several models in one job, and parts of one model on several ranks: who was first, and in which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradwatch.collector import document
from gradwatch.collector import observations as obs
from gradwatch.collector.fold import fold
from gradwatch.collector.model import Cause, Incident, LikelyKind
from gradwatch.collector.observations import Phase
from tests.collector.bodies import bad_weights, reduced, told_of
from tests.collector.history import Told, batch, hello, nonfinite, report

CRITIC, GENERATOR = 0, 1


def model(root: int, name: str, group: tuple[int, ...] = ()) -> obs.ModelSeen:
    return obs.ModelSeen(root, name, "DistributedDataParallel", len(group) or 2, 8, (), group)


def with_models(world_size: int, *models: obs.ModelSeen) -> Told:
    told = Told()
    for rank in range(world_size):
        told.tell(batch(f"r{rank}", 0, hello(rank, world_size), *models))
    return told


def text(incident: Incident) -> str:
    return " ".join(document.incident(incident).verdict)


def bad(round_: int, root: int, model_step: int, **changes: object) -> obs.NonFinite:
    known = {"phase": Phase.LOSS, "weights_finite": True, "step": round_} | changes
    return nonfinite(round_, root=root, model_step=model_step, **known)


# What rank 1 sees after rank 0 was first, in round 10 and the critic's step 0; and whether that is its own.
LATER = [
    # The generator's turn comes in the next round, and the critic's weights are NaN.
    (bad(11, GENERATOR, 3, weights_finite=False), False),
    # The same optimizer's next turn, whatever the clock shows.
    (bad(11, CRITIC, 1, weights_finite=False), False),
    (bad(11, CRITIC, 1, weights_finite=False, step=10), False),
    # Whether the weights were finite is not known.
    (bad(11, CRITIC, 1, weights_finite=None), False),
    # Gradients are added to what was reduced before: a reduction in every micro-batch.
    (bad(11, CRITIC, 0, step=10), False),
    # What the generator gets back comes through the critic.
    (bad(11, GENERATOR, 3), False),
    # The weights were finite, and so nothing had come from the first: it stands for itself.
    (bad(11, CRITIC, 1), True),
    (bad(11, GENERATOR, 3, phase=Phase.INPUT), True),
    (bad(11, CRITIC, 0, phase=Phase.INPUT, step=10), True),
]


@pytest.mark.parametrize(("later", "itself"), LATER)
def test_a_rank_that_was_finite_in_the_first_round(later, itself):
    told = with_models(2, model(CRITIC, "Critic"), model(GENERATOR, "Generator"))
    told.tell(batch("r0", 3, bad(10, CRITIC, 0)), *told_of_progress(0, 12, 4, bad_rounds=1))
    told.tell(batch("r1", 3, later), *told_of_progress(1, 12, 4, bad_rounds=1))
    verdict = told.incident.verdict
    assert [one.rank for one in verdict.origins] == ([0, 1] if itself else [0])
    assert verdict.contaminated_ranks == (() if itself else (1,))
    assert "before any update was applied" not in text(told.incident)
    assert "All ranks were bad at once" not in text(told.incident)
    # All ranks are bad before the critic has learned anything, and not in one round.
    assert verdict.likely[0].kind is not LikelyKind.INITIALISATION


def told_of_progress(rank: int, round_: int, records: int, **changes: object) -> list[obs.Progress]:
    (only,) = told_of(rank, round_, last_bad_round=round_ - 1, **changes)
    return [replace(only, journal_records=records)]


@pytest.mark.parametrize("first_step", [0, 1])
def test_what_comes_before_anything_was_learned(first_step: int):
    """All ranks in one round; later in a job the same is no matter of initial weights."""
    told = with_models(2, model(0, "Net"))
    for rank in range(2):
        told.tell(batch(f"r{rank}", 2, bad(6, 0, first_step, phase=Phase.FORWARD)))
        told.tell(*told_of_progress(rank, 6, 3, bad_rounds=1))
    kinds = [one.kind for one in told.incident.verdict.likely]
    assert (kinds == [LikelyKind.INITIALISATION]) == (first_step == 0)


def test_the_verdict_says_which_model_it_was():
    told = with_models(2, model(0, "Actor"), model(1, ""), model(2, "Critic"))
    told.tell(batch("r1", 4, bad(6, 2, 5)), *told_of_progress(1, 7, 5, bad_rounds=1))
    told.tell(*told_of_progress(0, 7, 4))
    first = document.incident(told.incident).first
    # What has no module is no model of which anything could be said.
    assert (first.model.root, first.model.module_class, first.model.ordinal) == (2, "Critic", 1)
    assert first.model_step == 5
    assert "the gradient of a.weight in model 1 (Critic) turned NaN" in text(told.incident)


def test_of_a_single_model_nothing_has_to_be_said():
    told = with_models(2, model(0, "Net"))
    told.tell(batch("r1", 2, bad(6, 0, 5)), *told_of_progress(1, 7, 3, bad_rounds=1))
    first = document.incident(told.incident).first
    assert (first.model, first.model_step, first.group) == (None, None, None)
    assert "in model" not in text(told.incident)


def test_models_that_are_told_after_the_incident():
    told = Told()
    told.tell(batch("r0", 0, hello(0, 1), bad(6, 1, 5)))
    assert document.incident(told.incident).first.model is None
    told.tell(batch("r0", 2, model(0, "Actor"), model(1, "Critic")))
    assert document.incident(told.incident).first.model.module_class == "Critic"


def in_stages(phase: Phase, **changes: object) -> Told:
    """Two stages of a pipeline, each on two ranks; rank 3 is in the second."""
    told = Told()
    for rank in range(4):
        group = (0, 1) if rank < 2 else (2, 3)
        told.tell(batch(f"r{rank}", 0, hello(rank, 4), model(0, f"Stage{rank // 2}", group)))
    told.tell(batch("r3", 2, nonfinite(6, phase=phase, **changes)), *told_of_progress(3, 7, 3, bad_rounds=1))
    for rank in range(3):
        told.tell(batch(f"r{rank}", 2, reduced(6)), *told_of_progress(rank, 7, 3))
    return told


def test_within_a_mesh_a_rank_is_first_within_its_group():
    incident = in_stages(Phase.FORWARD).incident
    assert document.incident(incident).first.group == [2, 3]
    assert "Rank 3 on node n3 was first within its group (ranks 2 and 3):" in text(incident)
    assert "batch" not in text(incident).lower()


def test_what_another_rank_sent_is_no_batch():
    incident = in_stages(Phase.INPUT, exchanged=True).incident
    assert incident.verdict.cause is Cause.INPUT
    assert LikelyKind.BAD_DATA not in {one.kind for one in incident.verdict.likely}
    assert "What entered its part of the model was not finite: it may have come from another rank." in text(
        incident
    )
    assert "batch" not in text(incident).lower()


def test_tensors_that_are_exchanged_leave_it_open_who_was_first():
    told = with_models(2, model(0, "Experts"))
    told.tell(batch("r1", 2, nonfinite(6, phase=Phase.INPUT, exchanged=True)))
    told.tell(*told_of_progress(1, 7, 3, bad_rounds=1), *told_of_progress(0, 7, 2))
    assert "was first among what is known (tensors were exchanged between ranks):" in text(told.incident)
    assert LikelyKind.BAD_DATA not in {one.kind for one in told.incident.verdict.likely}


def test_who_was_sent_something_bad_comes_after_who_made_it():
    told = with_models(2, model(0, "Stage"))
    made = nonfinite(6, phase=Phase.BACKWARD, microbatch=1, exchanged=True)
    told.tell(batch("r1", 2, made), batch("r0", 2, nonfinite(6, phase=Phase.INPUT, exchanged=True)))
    told.tell(*told_of_progress(1, 7, 3, bad_rounds=1), *told_of_progress(0, 7, 3, bad_rounds=1))
    verdict = told.incident.verdict
    assert (verdict.first.rank, verdict.cause, verdict.tie) == (1, Cause.BACKWARD, False)


def test_many_groups_are_remembered_in_little_space():
    told = Told()
    for rank in range(300):
        told.tell(batch(f"r{rank}", 0, hello(rank, 300), model(0, "Net", (rank,))))
    (attempt,) = told.state.attempts.values()
    assert len(attempt.models) == 256
    # What there is no room for changes nothing, however often it is told.
    again = fold(told.state, report(batch("r299", 2, model(0, "Net", (299,)))), told.config, told.now)
    assert again.attempts == {}


def test_a_rank_whose_group_is_not_remembered_is_not_told_as_the_first_of_all():
    told = Told()
    for rank in range(300):
        told.tell(batch(f"r{rank}", 0, hello(rank, 300), model(0, "Net", (rank,))))
    told.tell(batch("r299", 2, nonfinite(6, phase=Phase.INPUT)))
    assert "was first among what is known (the ranks of its group are not):" in text(told.incident)
    assert LikelyKind.BAD_DATA not in {one.kind for one in told.incident.verdict.likely}
    assert document.incident(told.incident).first.exchanged


def test_only_the_first_lists_the_ranks_of_its_group():
    told = in_stages(Phase.FORWARD)
    told.tell(batch("r2", 3, nonfinite(6, phase=Phase.FORWARD)))
    assert [one.group for one in document.incident(told.incident).origins] == [[2, 3], None]
    told = with_models(2, model(0, "Net", (0, 1)))
    for rank in range(2):
        told.tell(batch(f"r{rank}", 2, bad_weights(6, None)))
    assert [one.group for one in document.incident(told.incident).origins] == [[0, 1], None]
