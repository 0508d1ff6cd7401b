"""Whatever happens: nothing poisoned or torn is resumed, nothing done twice, no budget exceeded."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collector.policy.decision import Outcome
from gradwatch.collector.policy.model import Action
from tests.collector.recovery.world import ROOT, World

TEXT = """
apiVersion: gradwatch/v1
mode: enforce
rules: [{{name: any, match: {{}}, action: rollback}}]
checkpoints: {{root: /ckpts}}
rollback: {{margin_steps: {margin}, quarantine: {quarantine}}}
budgets:
  - {{scope: job, max: {most}}}
  - {{scope: same_first_bad_step, max: 1}}
  - {{scope: no_progress, max: {idle}}}
"""
OTHER = TEXT.format(margin=0, quarantine="move", most=2, idle=2)
texts = st.builds(
    TEXT.format,
    margin=st.sampled_from([0, 2]),
    quarantine=st.sampled_from(["move", "move", "ledger"]),
    most=st.integers(1, 4),
    idle=st.integers(1, 3),
)
host = st.integers(0, 1)
save = st.tuples(
    st.just("save"),
    st.sampled_from(["new", "new", "latest"]),
    st.sampled_from([False, False, True]),
    st.booleans(),
)
disturbances = st.one_of(
    st.tuples(st.just("train"), st.integers(1, 3)),
    st.tuples(st.just("bad"), host),
    save,
    st.tuples(st.just("look")),
    st.tuples(st.just("obey"), host),
    st.tuples(st.just("obey"), host),
    st.tuples(st.just("kill_launcher"), host),
    st.tuples(st.just("launch"), host),
    st.tuples(st.just("kill_collector")),
    st.tuples(st.just("crash")),
    st.tuples(st.just("wait"), st.sampled_from([1, 20, 130])),
    st.tuples(st.just("rotate")),
    st.tuples(st.just("reload"), st.sampled_from(["mode: enforce", "{", OTHER])),
)
# A job that trains and saves, meets a NaN, and then anything.
episodes = st.builds(
    lambda before, file, after, rank, late, then: [
        ("train", before),
        ("save", *file),
        ("look",),
        ("train", after),
        ("bad", rank),
        *late,
        *then,
        ("settle",),
        ("launch_all",),
        ("settle",),
    ],
    st.integers(1, 6),
    st.sampled_from(
        [("new", False, True), ("new", False, True), ("latest", False, True), ("new", True, True)]
    ),
    st.integers(0, 3),
    host,
    st.lists(save, max_size=2),
    st.lists(disturbances, max_size=8),
)
stories = st.lists(episodes, min_size=1, max_size=5).map(
    lambda parts: [one for part in parts for one in part]
)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(1, 2), stories, st.booleans(), st.booleans())
def test_no_bad_checkpoint_is_resumed_and_nothing_is_done_twice(text, hosts, story, twice, saves):
    world = World.under(text, hosts)
    world.twice, world.saves_when_told = twice, saves
    for one in world.hosts:
        world.launch(one)
    world.settle()
    concluded: Counter[str] = Counter()
    for action in story:
        before = {one.id: one.outcome for one in world.decisions}
        play(world, action)
        for one in world.decisions:
            if before.get(one.id) in {None, Outcome.PENDING} and one.outcome is Outcome.PERFORMED:
                concluded[one.id] += 1
            assert before.get(one.id, one.outcome) in {one.outcome, Outcome.PENDING}, "it changed again"
        policy = world.policy.policy
        assert policy is not None
        for one in world.decisions:
            if one.action is Action.ROLLBACK:
                for spent in one.evidence.budgets:
                    assert spent.used < spent.max, "it was decided over the budget"
    assert all(times == 1 for times in concluded.values())
    rollbacks = [one for one in world.decisions if one.action is Action.ROLLBACK]
    first_bad = Counter(one.first_bad_step for one in rollbacks)
    assert all(times <= 1 for times in first_bad.values())
    # A generation begins with a rollback that was performed, and with nothing else.
    begun = {generation for generation, _ in world.resumed if generation > 0}
    assert len(begun) <= len(world.performed())


def play(world: World, action: tuple) -> None:  # type: ignore[type-arg]
    what, *how = action
    if what == "train":
        world.train(how[0])
    elif what == "bad":
        world.train(2, bad_rank=how[0])
    elif what == "save":
        name, torn, told = how
        world.save(
            f"{ROOT}/{world.step if name == 'new' else name}", torn=torn, told=told or name == "latest"
        )
    elif what == "look":
        world.look_after()
    elif what == "obey":
        world.obey(world.hosts[how[0] % len(world.hosts)])
    elif what == "settle":
        world.settle()
    elif what == "launch_all":
        for one in world.hosts:
            if one.command == "none":
                world.launch(one)
    elif what == "kill_launcher":
        world.kill_launcher(world.hosts[how[0] % len(world.hosts)])
    elif what == "launch":
        world.launch(world.hosts[how[0] % len(world.hosts)])
    elif what == "kill_collector":
        world.kill_collector()
    elif what == "crash":
        world.crash()
    elif what == "wait":
        world.wait(how[0])
    elif what == "rotate" and world.disk:
        # A rotation between a look and an order is only noticed by the one who resumes: not while one runs.
        if world.dossier.recovery is None and world.training is not None:
            del world.disk[min(world.disk, key=lambda path: world.disk[path].mtime)]
            world.look_after()
    elif what == "reload":
        world.reload(how[0])
