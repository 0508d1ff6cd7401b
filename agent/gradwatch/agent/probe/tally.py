"""Which rounds of a rank are under way, and which of them were bad: what its progress tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gradwatch.agent.probe.rounds import Moment

# A job that goes on with NaN weights has nothing new to say: after this many bad
# rounds in a row the rest is only counted.
ROUNDS_IN_FULL = 16
# A GradScaler begins at 65,536 and halves: more overflows in a row than lead from there to 1 are none.
OVERFLOWS_IN_A_ROW = 16


class Tally:
    """Of one journal.

    Attributes:
        rounds: reductions finished in this process, over all its models: the logical clock.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self._next_round = 0
        self._under_way: list[Moment] = []
        # All before this one have been reduced, and that has been looked at.
        self._reduced_round = 0
        self._last_bad_round: int | None = None
        self._bad_rounds = 0
        # Of the rounds under way: those with bad gradients, and those that are a GradScaler's overflows.
        self._bad_now: set[int] = set()
        self._excused: set[int] = set()
        # Rounds under way of which something has been looked at.
        self._settled: set[int] = set()
        # Of the rounds whose reduction has not been looked at, those with bad gradients of this rank's own.
        self._locally_bad: set[int] = set()
        self._bad_streak = 0
        # By model.
        self._reduced_bad_streaks: dict[int, int] = {}
        self._dropped: dict[str, int] = {}

    def next_round(self) -> int:
        """The number of a reduction that begins; two models may be reduced in one backward pass."""
        number = max(self._next_round, self.rounds)
        self._next_round = number + 1
        return number

    def begin(self, moment: Moment) -> None:
        """It is waited for until it is settled or forgotten."""
        self._under_way.append(moment)

    def forget(self, moment: Moment) -> None:
        """Nothing of it is to be waited for."""
        if moment in self._under_way:
            self._under_way.remove(moment)
            self._end(moment.round)

    def settle(self, moment: Moment) -> None:
        """All of its gradients have been looked at."""
        self._settled.add(moment.round)
        if moment in self._under_way:
            self._under_way.remove(moment)
        self._end(moment.round)

    def _end(self, round_: int) -> None:
        """A round is over once it has been looked at and nothing more of it is under way.

        That may be a later micro-batch, or the gradients that no watched model owns.
        """
        if round_ not in self._settled or any(other.round == round_ for other in self._under_way):
            return
        self._settled.discard(round_)
        if round_ in self._excused:
            # The scaler at work: it is no news how often, and it is told all the same.
            self._excused.discard(round_)
            self._bad_now.discard(round_)
        elif round_ in self._bad_now:
            self._bad_now.discard(round_)
            self._bad_streak += 1
        else:
            self._bad_streak = 0

    def found(self, root: int, round_: int, *, overflow: bool) -> None:
        """Gradients of this rank's own are bad.

        Args:
            root: ordinal of the model.
            round_: in which they are reduced.
            overflow: a GradScaler will skip them, as far as known.
        """
        if overflow and self.excuses(root):
            self._excused.add(round_)
        self._locally_bad.add(round_)
        if round_ not in self._bad_now:
            self._bad_now.add(round_)
            self._bad_rounds += 1

    def reduced(self, root: int, round_: int, *, bad: bool) -> None:
        """The reduced gradients of a model's round have been looked at."""
        self._locally_bad.discard(round_)
        self._reduced_round = max(self._reduced_round, round_ + 1)
        self._reduced_bad_streaks[root] = self._reduced_bad_streaks.get(root, 0) + 1 if bad else 0
        if bad:
            self._last_bad_round = max(self._last_bad_round or 0, round_)

    def drop(self, reason: str) -> None:
        """Count something that was not written or not looked at."""
        self._dropped[reason] = self._dropped.get(reason, 0) + 1

    @property
    def brief(self) -> bool:
        """Whether findings are only counted by now."""
        return self._bad_streak >= ROUNDS_IN_FULL

    @property
    def in_a_streak(self) -> bool:
        """Whether the rank's own gradients were bad in the round before."""
        return self._bad_streak > 0

    def after_a_bad_reduction(self, root: int) -> bool:
        """Whether a model's reduced gradients were bad in its round before."""
        return self._reduced_bad_streaks.get(root, 0) > 0

    def excuses(self, root: int) -> bool:
        """Whether one overflow more of a model would be the work of a GradScaler."""
        return self._reduced_bad_streaks.get(root, 0) < OVERFLOWS_IN_A_ROW

    def is_excused(self, round_: int) -> bool:
        """Whether a round under way is a GradScaler's overflow."""
        return round_ in self._excused

    def is_locally_bad(self, round_: int) -> bool:
        """Whether gradients of this rank's own are bad, of a round whose reduction was not looked at yet."""
        return round_ in self._locally_bad

    def progress(self, held: Iterable[int], dropped: Mapping[str, int]) -> dict[str, Any]:
        """Its part of a `Progress` message.

        Args:
            held: rounds that are not to be vouched for yet.
            dropped: what others count, by reason.
        """
        reasons = {*self._dropped, *dropped}
        message: dict[str, Any] = {
            "round": min([self.rounds, *(moment.round for moment in self._under_way), *held]),
            "bad_rounds": self._bad_rounds,
            "reduced_round": self._reduced_round,
            "dropped": {reason: self._dropped.get(reason, 0) + dropped.get(reason, 0) for reason in reasons},
        }
        if self._last_bad_round is not None:
            message["last_bad_round"] = self._last_bad_round
        return message
