"""The launcher's life as a state machine. Pure: how things are goes in, what to do next comes out.

::

    WAITING ──START──▶ RUNNING ──STOP, HALT──▶ STOPPING ──nothing lives──▶ STOPPED ──START──▶ RUNNING
       │                  └──the command ends──────▲  │                       │
       └──HALT, the user──▶ ENDED ◀───────────────────┴───────────────────────┘ HALT, RELEASE, the user

Without a policy there are no orders: RUNNING, STOPPING what the command left behind, ENDED.
The protocol is docs/decisions/0007.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from gradwatch.agent.launch.journal import Commanded
from gradwatch.agent.launch.orders import Action
from gradwatch.cli.launcher.report import EndedBy, Ending

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradwatch.agent.launch.orders import Order

ROLLBACK_DUE = 75
HALTED = 93


class State(enum.Enum):
    """Where the launcher is."""

    WAITING = "waiting"  # for the first START
    RUNNING = "running"
    STOPPING = "stopping"  # the command is to end, or has ended, and not all it started is gone
    STOPPED = "stopped"  # nothing lives; waiting for an order
    ENDED = "ended"


class Act(enum.Enum):
    """What is to be done now."""

    NOTHING = "nothing"
    START = "start"  # the command, in the life's generation, by its order
    TERMINATE = "terminate"  # the command, gently
    WAIT_FOR_RANKS = "wait_for_ranks"  # the command has ended well, and some of its ranks work on
    TERMINATE_LEFT = "terminate_left"  # what the command left behind, gently
    KILL = "kill"  # all that lives
    REPORT = "report"  # that the command is stopped
    END = "end"


class Why(enum.Enum):
    """Why it was decided; what is not in here needs no word to the user."""

    ORDERED = "ordered"
    NO_ORDER = "no_order"  # started without one
    NO_ANSWER = "no_answer"  # stopped, and the collector is silent
    CANNOT_RESUME = "cannot_resume"
    EXCLUDE_NODE = "exclude_node"
    OWN = "own"  # of the command, or of the user


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the launcher goes by.

    Attributes:
        obeys: it was given a policy, and can be given orders.
        restarts: it starts the command again after a rollback; else it ends with 75.
        start_seconds: how long to wait for the first order when nobody answers.
        grace_seconds: from SIGTERM for the command to SIGKILL for all that lives; torchrun takes 30 s.
        left_seconds: the same for what a command left behind that ended by itself.
        rank_seconds: how long ranks may work on after a command that ended well, as those of Lightning's own
            launcher do: they write what they have predicted.
        verdict_seconds: how long a command that failed waits for what is decided about it.
        answer_seconds: how long a stopped command waits for a collector that is silent.
    """

    obeys: bool = False
    restarts: bool = True
    start_seconds: float = 20.0
    grace_seconds: float = 40.0
    left_seconds: float = 5.0
    rank_seconds: float = 600.0
    verdict_seconds: float = 15.0
    answer_seconds: float = 300.0


@dataclasses.dataclass(frozen=True)
class Facts:
    """How things are.

    Attributes:
        status: exit code of the command, or minus the signal that ended it; None while it runs.
        left: how many processes live that the command started; looked at in STOPPING only.
        ranks_left: how many of these are ranks of the job.
        user_signal: the first signal by which the user asked the run to end.
        impatient: the user asked so while the command did not run any more.
        heard_at: monotonic time of the newest word from the collector.
        cannot_resume: why what the order says to resume cannot be used; None when it can.
        commanded: what a framework's controller says that takes the orders; None when there is none.
    """

    status: int | None = None
    left: int = 0
    ranks_left: int = 0
    user_signal: int | None = None
    impatient: bool = False
    heard_at: float = 0.0
    cannot_resume: str | None = None
    commanded: Commanded | None = None


@dataclasses.dataclass(frozen=True)
class Life:
    """The launcher's state.

    Attributes:
        state: where it is.
        generation: the command runs in it, or ran last.
        since: monotonic time at which the state was entered.
        order: the one that is obeyed: to stop in STOPPING and STOPPED, to start in RUNNING.
        kill_at: monotonic time at which STOPPING becomes a SIGKILL.
        left_told: whether what was left behind has had its SIGTERM.
        waits_until: monotonic time up to which ranks are waited for that work on; None when they are not.
        answered: the collector has said that a rollback is under way.
        ending: how the run ends, in ENDED.
        why: the reason of the newest change.
        acted: the id and action of every order that was acted on.
    """

    state: State
    generation: int
    since: float
    order: Order | None = None
    kill_at: float = 0.0
    left_told: bool = False
    waits_until: float | None = None
    answered: bool = False
    ending: Ending | None = None
    why: Why = Why.OWN
    acted: frozenset[tuple[str, Action]] = frozenset()

    @property
    def exclude_node(self) -> str | None:
        """The host for whose sake the run ended: the job is to go on without it."""
        return self.order.exclude_node if self.why is Why.EXCLUDE_NODE and self.order is not None else None


def begin(rules: Rules, generation: int, now: float) -> tuple[Life, Act]:
    """The first state: one that obeys waits for its order, any other starts at once."""
    if rules.obeys:
        return Life(State.WAITING, generation, now), Act.NOTHING
    return Life(State.RUNNING, generation, now), Act.START


def step(life: Life, order: Order | None, facts: Facts, rules: Rules, now: float) -> tuple[Life, Act]:
    """What to do next.

    Args:
        life: as the last call left it.
        order: the newest; the same one again changes nothing.
        facts: how things are.
        rules: what the launcher goes by.
        now: monotonic seconds.
    """
    if not rules.obeys or (order is not None and (order.id, order.action) in life.acted):
        order = None
    return _STEPS[life.state](life, _Seen(order, facts, rules, now))


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one step goes by."""

    order: Order | None
    facts: Facts
    rules: Rules
    now: float

    def is_silent(self, life: Life) -> bool:
        """Whether the collector has not been heard of for too long."""
        return self.now - max(life.since, self.facts.heard_at) >= self.rules.answer_seconds

    def order_to(self, action: Action) -> Order | None:
        """The order, if it is to do this."""
        return self.order if self.order is not None and self.order.action is action else None


def _idle(life: Life, seen: _Seen) -> tuple[Life, Act]:
    """The command does not run: it was not started yet, was stopped, or has failed."""
    if seen.facts.user_signal is not None:
        return _by_user(life, seen.facts)
    halt = seen.order_to(Action.HALT)
    if halt is not None:
        return _end(_obeying(life, halt), Ending(HALTED, EndedBy.HALTED), Why.ORDERED)
    if life.state is State.WAITING:
        return _waiting(life, seen)
    return _crashed(life, seen) if life.order is None else _stopped(life, seen)


def _waiting(life: Life, seen: _Seen) -> tuple[Life, Act]:
    start = seen.order_to(Action.START)
    if start is not None and start.generation >= life.generation:
        # What the supervisor did about a host that was to be left out is its own affair.
        return _start(life, start, seen)
    # A rollback is under way, and we are to wait for the others.
    life = dataclasses.replace(life, answered=life.answered or seen.order_to(Action.STOP) is not None)
    if life.answered:
        return _unless_silent(life, seen)
    if seen.now - life.since >= seen.rules.start_seconds:
        return _into(life, State.RUNNING, seen.now, why=Why.NO_ORDER), Act.START
    return life, Act.NOTHING


def _running(life: Life, seen: _Seen) -> tuple[Life, Act]:
    if seen.facts.status is not None:
        kill_at = seen.now + seen.rules.left_seconds
        life = _into(life, State.STOPPING, seen.now, why=Why.OWN)
        return dataclasses.replace(life, kill_at=kill_at), Act.NOTHING
    stop, halt = seen.order_to(Action.STOP), seen.order_to(Action.HALT)
    if stop is not None and stop.generation != life.generation:
        stop = None
    order = stop or halt
    if order is None or seen.facts.user_signal is not None:
        return life, Act.NOTHING
    kill_at = seen.now + seen.rules.grace_seconds
    life = _into(_obeying(life, order), State.STOPPING, seen.now, order, Why.ORDERED)
    return dataclasses.replace(life, kill_at=kill_at), Act.TERMINATE


def _stopping(life: Life, seen: _Seen) -> tuple[Life, Act]:
    facts = seen.facts
    halt = seen.order_to(Action.HALT)
    if halt is not None and life.order is not None:
        life = _obeying(life, halt)
    if facts.status is None or facts.left:
        return _while_some_live(life, seen)
    if facts.user_signal is not None:
        return _by_user(life, facts)
    if life.order is None and (facts.status == 0 or not seen.rules.obeys):
        return _end(life, of_command(facts), Why.OWN)
    if life.order is not None and life.order.action is Action.HALT:
        return _end(life, Ending(HALTED, EndedBy.HALTED), Why.ORDERED)
    return _into(life, State.STOPPED, seen.now, life.order, life.why), Act.REPORT


def _while_some_live(life: Life, seen: _Seen) -> tuple[Life, Act]:
    ended = seen.facts.status is not None
    works_on = seen.facts.status == 0 and bool(seen.facts.ranks_left) and seen.facts.user_signal is None
    if works_on and life.order is None and life.waits_until is None:
        return dataclasses.replace(life, waits_until=seen.now + seen.rules.rank_seconds), Act.WAIT_FOR_RANKS
    if life.waits_until is not None and not life.left_told:
        if works_on and seen.now < life.waits_until:
            return life, Act.NOTHING
        life = dataclasses.replace(life, kill_at=seen.now + seen.rules.left_seconds)
    # Who asks for the end once more does not want to wait for the rest.
    if seen.now >= life.kill_at or (ended and seen.facts.impatient):
        return life, Act.KILL
    if ended and not life.left_told:
        return dataclasses.replace(life, left_told=True), Act.TERMINATE_LEFT
    return life, Act.NOTHING


def _stopped(life: Life, seen: _Seen) -> tuple[Life, Act]:
    """Stopped by an order."""
    start = seen.order_to(Action.START)
    if start is None or start.generation <= life.generation:
        return _unless_silent(life, seen)
    due = Ending(ROLLBACK_DUE, EndedBy.ROLLBACK_DUE)
    if start.exclude_node:
        # The world size is fixed: no launcher can go on without the host's ranks.
        return _end(_obeying(life, start), due, Why.EXCLUDE_NODE)
    if not seen.rules.restarts:
        return _end(_obeying(life, start), due, Why.ORDERED)
    return _start(life, start, seen)


def _crashed(life: Life, seen: _Seen) -> tuple[Life, Act]:
    """The command has ended by itself, and failed."""
    order = seen.order
    if order is not None and order.action is Action.START and order.generation > life.generation:
        return _stopped(life, seen)
    if order is not None and order.generation == life.generation:
        if order.action is Action.RELEASE:
            return _end(life, of_command(seen.facts), Why.OWN)
        if order.action is Action.STOP:
            # It is down already, and now it is for an order.
            return _into(_obeying(life, order), State.STOPPED, seen.now, order, Why.ORDERED), Act.REPORT
    if seen.now - life.since >= seen.rules.verdict_seconds:
        return _end(life, of_command(seen.facts), Why.OWN)
    return life, Act.NOTHING


def of_command(facts: Facts) -> Ending:
    """The command's own ending.

    Args:
        facts: with the command's status.
    """
    status = facts.status or 0
    if status and facts.commanded is Commanded.HALTED:
        return Ending(HALTED, EndedBy.HALTED)
    if status < 0:
        return Ending(128 - status, EndedBy.SIGNAL)
    signalled = facts.user_signal is not None and status
    return Ending(status, EndedBy.SIGNAL if signalled else EndedBy.COMMAND)


def _start(life: Life, order: Order, seen: _Seen) -> tuple[Life, Act]:
    life = _obeying(life, order)
    if seen.facts.cannot_resume is not None:
        # Without it the command would begin afresh, over what it has saved.
        return _end(life, Ending(HALTED, EndedBy.HALTED), Why.CANNOT_RESUME)
    life = dataclasses.replace(life, generation=order.generation)
    return _into(life, State.RUNNING, seen.now, order, Why.ORDERED), Act.START


def _unless_silent(life: Life, seen: _Seen) -> tuple[Life, Act]:
    if seen.is_silent(life):
        return _end(life, Ending(HALTED, EndedBy.HALTED), Why.NO_ANSWER)
    return life, Act.NOTHING


def _by_user(life: Life, facts: Facts) -> tuple[Life, Act]:
    if facts.status is not None and life.order is None:
        return _end(life, of_command(facts), Why.OWN)
    return _end(life, Ending(128 + (facts.user_signal or 0), EndedBy.SIGNAL), Why.OWN)


def _into(life: Life, state: State, now: float, order: Order | None = None, why: Why = Why.OWN) -> Life:
    return dataclasses.replace(life, state=state, since=now, order=order, why=why, left_told=False)


def _end(life: Life, ending: Ending, why: Why) -> tuple[Life, Act]:
    return dataclasses.replace(life, state=State.ENDED, ending=ending, why=why), Act.END


def _obeying(life: Life, order: Order) -> Life:
    # Orders for a first start carry no id; the generation keeps those from being obeyed twice.
    acted = life.acted | {(order.id, order.action)} if order.id else life.acted
    return dataclasses.replace(life, order=order, acted=acted)


def _ended(life: Life, _seen: _Seen) -> tuple[Life, Act]:
    return life, Act.NOTHING


_STEPS: dict[State, Callable[[Life, _Seen], tuple[Life, Act]]] = {
    State.WAITING: _idle,
    State.RUNNING: _running,
    State.STOPPING: _stopping,
    State.STOPPED: _idle,
    State.ENDED: _ended,
}
