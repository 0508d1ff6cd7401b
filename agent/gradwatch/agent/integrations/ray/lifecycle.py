"""What to do about a worker group, by what is ordered. Pure.

::

    WAITING ──START──▶ RUNNING ──STOP──▶ STOPPING ──the group is gone──▶ STOPPED ──START──▶ RUNNING
                          └──the group fails by itself──────────────────────▲

Ray Train restarts a worker group that failed, with us or without us: so every group is a generation of its
own, and the question before each is from which checkpoint. The protocol is docs/decisions/0007 and 0014.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from gradwatch.agent.launch.orders import Action

if TYPE_CHECKING:
    from gradwatch.agent.launch.orders import Order


class State(enum.Enum):
    """Where the run is."""

    WAITING = "waiting"  # for the first START
    RUNNING = "running"
    STOPPING = "stopping"  # Ray has been told that the group has failed
    STOPPED = "stopped"  # no worker lives; waiting for an order


class Act(enum.Enum):
    """What is to be done now."""

    NOTHING = "nothing"
    FAIL = "fail"  # tell Ray that the group has failed, so that it starts the next
    HALT = "halt"  # end the run
    REPORT = "report"  # that no worker lives
    START = "start"  # let the group start, in the life's generation, by its order


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the run goes by.

    Attributes:
        obeys: a policy was given.
        start_seconds: how long to wait for the first order when nobody answers.
        verdict_seconds: how long a group that failed by itself waits for what is decided about it.
        answer_seconds: how long a group that was stopped waits for a collector that is silent.
    """

    obeys: bool = False
    start_seconds: float = 20.0
    verdict_seconds: float = 15.0
    answer_seconds: float = 300.0


@dataclasses.dataclass(frozen=True)
class Life:
    """The run's state.

    Attributes:
        generation: of the group that runs, or ran last.
        since: monotonic time at which the state was entered.
        order: the one that is obeyed: to stop in STOPPING and STOPPED, to start in RUNNING.
        pin: the newest checkpoint that was said to be good; kept for a group that starts without an order.
        acted: the id, action and generation of every order that was acted on.
    """

    state: State
    generation: int
    since: float
    order: Order | None = None
    pin: Order | None = None
    acted: frozenset[tuple[str, Action, int]] = frozenset()


def begin(generation: int, now: float) -> Life:
    """Before the first group."""
    return Life(State.WAITING, generation, now)


def polled(life: Life, order: Order | None, rules: Rules) -> tuple[Life, Act]:
    """While a group runs.

    Args:
        life: as the last call left it.
        order: the newest; the same one again changes nothing.
        rules: what the run goes by.
    """
    if order is None or not rules.obeys or life.state is not State.RUNNING or _is_done(life, order):
        return life, Act.NOTHING
    if order.action is Action.HALT:
        return _obeying(life, order), Act.HALT
    if order.action is Action.STOP and order.generation == life.generation:
        return dataclasses.replace(_obeying(life, order), state=State.STOPPING), Act.FAIL
    return life, Act.NOTHING


def between(
    life: Life, order: Order | None, rules: Rules, *, heard_at: float, now: float
) -> tuple[Life, Act]:
    """While Ray is about to start a group: to be asked until it says START or HALT.

    Args:
        life: as the last call left it.
        order: the newest; the same one again changes nothing.
        rules: what the run goes by.
        heard_at: monotonic time of the newest word from the collector.
        now: monotonic seconds.
    """
    if life.state in {State.RUNNING, State.STOPPING}:
        by_itself = life.state is State.RUNNING
        life = dataclasses.replace(
            life, state=State.STOPPED, since=now, order=None if by_itself else life.order
        )
        return (life, Act.REPORT) if rules.obeys else _start(life, None, life.generation + 1, now)
    if not rules.obeys:
        return _start(life, None, life.generation, now)
    if order is not None and not _is_done(life, order):
        if order.action is Action.HALT:
            return _obeying(life, order), Act.HALT
        first = life.state is State.WAITING
        if order.action is Action.START and order.generation >= life.generation + (not first):
            return _start(_obeying(life, order), order, order.generation, now)
        if order.action is Action.STOP and life.order is None and not first:
            # It is down already, and now it is for an order.
            return _obeying(life, order), Act.REPORT
    return _patient(life, rules, heard_at, now)


def _patient(life: Life, rules: Rules, heard_at: float, now: float) -> tuple[Life, Act]:
    """Wait on, or go without an order."""
    waited = now - life.since
    if life.state is State.WAITING and waited >= rules.start_seconds:
        return _start(life, None, life.generation, now)
    if life.state is State.STOPPED and life.order is None and waited >= rules.verdict_seconds:
        return _start(life, None, life.generation + 1, now)
    if life.order is not None and now - max(life.since, heard_at) >= rules.answer_seconds:
        return life, Act.HALT
    return life, Act.NOTHING


def _start(life: Life, order: Order | None, generation: int, now: float) -> tuple[Life, Act]:
    pin = order if order is not None and order.resume_path else life.pin
    life = dataclasses.replace(
        life, state=State.RUNNING, generation=generation, since=now, order=order, pin=pin
    )
    return life, Act.START


def _is_done(life: Life, order: Order) -> bool:
    return (order.id, order.action, order.generation) in life.acted


def _obeying(life: Life, order: Order) -> Life:
    # Orders for a first start carry no id; the generation keeps those from being obeyed twice.
    acted = life.acted | {(order.id, order.action, order.generation)} if order.id else life.acted
    return dataclasses.replace(life, order=order, acted=acted)
