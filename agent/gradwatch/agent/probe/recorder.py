"""The flight recorder of one model: how large its gradients were in the last rounds, and how that went on.

What it has is told with the first bad round of a stretch, and when gradients grow far. A round is kept as
plain numbers: for few parameters an operator of torch costs more than the whole of them.
"""

from __future__ import annotations

import itertools
import math
import operator
from array import array
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe.early_warning import Limits, alarms, grown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradwatch.agent.probe.parameters import ParameterInfo

# Rounds that are kept, fewer for models with so many parameters that they would take more than these bytes.
ROUNDS = 32
BYTES = 8 * 2**20
# Parameters that a `Flight` tells of.
TOLD = 24
# Rounds between two looks at what is usual.
_ALARM_EVERY = 8
# A gradient has come back to normal below this many times its usual magnitude.
_NORMAL = 10.0
_LIMITS = Limits()


@dataclass(frozen=True)
class RoundFacts:
    """A round, beside its gradients.

    Attributes:
        round: ordinal of the reduction.
        step: the update attempt under way.
        loss: before it was scaled; None when not known.
        loss_scale: None without a GradScaler.
        learning_rate: of the last update attempt; None when not known.
        batch: JSON of the user's tag.
    """

    round: int
    step: int
    loss: float | None = None
    loss_scale: float | None = None
    learning_rate: float | None = None
    batch: str | None = None


class Recorder:
    """The last rounds of one model.

    Args:
        root: ordinal of the model in its process.
        infos: its parameters by key, in its order.

    Attributes:
        rounds: facts of those that are kept, oldest first.
        nbytes: of memory, at most.
    """

    def __init__(self, root: int, infos: Mapping[int, ParameterInfo]) -> None:
        self.root = root
        self._infos = list(infos.values())
        self._keys = list(infos)
        self._capacity = max(1, min(ROUNDS, BYTES // (8 * max(1, len(infos)))))
        # With those below which there is no alarm.
        self.nbytes = 8 * (self._capacity + 1) * len(infos)
        self.start_over()

    def start_over(self) -> None:
        """Forget everything: what comes may be quite different."""
        self.rounds: list[RoundFacts] = []
        # Of each of these, the magnitudes in the order of the parameters.
        self._magnitudes: deque[array[float]] = deque(maxlen=self._capacity)
        # Of the newest; None when it is not finite.
        self._largest: float | None = None
        self._count = 0
        self._alarms: array[float] | None = None
        self._lowest_alarm = -math.inf
        self._alarms_at = 0
        # Of a warning that was given: the place that has grown most, what is normal there, and when.
        self._warned: tuple[int, float, int] | None = None

    def add(self, facts: RoundFacts, magnitudes: Mapping[int, float]) -> None:
        """Keep a round.

        Args:
            facts: about it.
            magnitudes: of its local gradients, by key; those without a gradient count as 0.
        """
        row = list(map(magnitudes.get, self._keys, itertools.repeat(0.0)))
        # A finite sum tells it of each of them; one of finite numbers may overflow.
        finite = math.isfinite(sum(row)) or all(map(math.isfinite, row))
        self._largest = max(row, default=0.0) if finite else None
        self._magnitudes.append(array("d", row))
        self._count += 1
        self.rounds = [*self.rounds[1 - self._capacity :], facts] if self._capacity > 1 else [facts]

    def magnitude(self, key: int) -> float | None:
        """Of a parameter's gradient in the newest round."""
        if not self.rounds or key not in self._keys:
            return None
        return self._magnitudes[-1][self._keys.index(key)]

    def largest(self) -> float | None:
        """Of all gradients of the newest round, as if there had been no GradScaler; None when not finite."""
        if not self.rounds or self._largest is None:
            return None
        return _short(self._largest / (self.rounds[-1].loss_scale or 1.0))

    @property
    def newest(self) -> RoundFacts | None:
        """The last round that was added."""
        return self.rounds[-1] if self.rounds else None

    # ------------------------------------------------------------------ early warning

    def exploding(self) -> dict[str, Any] | None:
        """The `Exploding` message, in its JSON mapping, if the newest round is far beyond the ones before.

        Once, until the gradients have come back to normal, or what is kept has become what is usual.
        """
        if len(self.rounds) <= _LIMITS.rounds:
            return None
        if self._warned is None and self._is_below_all_alarms():
            return None
        now = _unscaled(self._magnitudes[-1], self.rounds[-1])
        if self._warned is not None:
            place, normal, since = self._warned
            if now[place] < normal or self._count - since > self._capacity:
                self._warned = None
            return None
        if self._alarms is None or self._count - self._alarms_at >= _ALARM_EVERY:
            self._alarms = array("d", alarms(self._before(), _LIMITS).tolist())
            self._lowest_alarm = min(self._alarms, default=math.inf)
            self._alarms_at = self._count
        if not any(map(operator.gt, now, self._alarms)):
            return None
        growth = grown(self._before(), _tensor(now), _LIMITS)
        if growth is None:
            return None
        place = growth.places[0]
        self._warned = (place, _NORMAL * growth.usual, self._count)
        facts, info = self.rounds[-1], self._infos[place]
        return {
            "root": self.root,
            "round": facts.round,
            "step": facts.step,
            "parameter": info.name,
            "module": info.module,
            "module_class": info.module_class,
            "magnitude": now[place],
            "usual": growth.usual,
            "parameters_total": len(growth.places),
        }

    def _is_below_all_alarms(self) -> bool:
        """Whether the largest of the newest round is below each parameter's alarm; most often it is."""
        if self._alarms is None or self._count - self._alarms_at >= _ALARM_EVERY or self._largest is None:
            return False
        return self._largest / (self.rounds[-1].loss_scale or 1.0) <= self._lowest_alarm

    def _before(self) -> torch.Tensor:
        """Magnitudes of the rounds before the newest, oldest first, as if there had been no GradScaler."""
        kept = zip(self._magnitudes, self.rounds, strict=True)
        return torch.stack([_tensor(_unscaled(row, facts)) for row, facts in kept][:-1])

    # ------------------------------------------------------------------ how it came to this

    def flight(self) -> dict[str, Any] | None:
        """The `Flight` message, in its JSON mapping, up to the newest round; None when nothing is kept."""
        if not self.rounds:
            return None
        rows, last = torch.stack(list(map(_tensor, self._magnitudes))), self.rounds[-1]
        told = sorted(_worth_telling(rows))
        if not told:
            return None
        first_bad = next((place for place in told if not math.isfinite(rows[-1, place])), told[0])
        dtype = self._infos[first_bad].dtype
        return {
            "root": self.root,
            "round": last.round,
            "step": last.step,
            "parameters": [self._infos[place].name for place in told],
            "steps": [_flight_step(facts, row, told) for row, facts in zip(rows, self.rounds, strict=True)],
            "dtype_max": torch.finfo(getattr(torch, dtype)).max,
            "dtype": dtype,
        }


def _unscaled(row: array[float], facts: RoundFacts) -> array[float]:
    """The magnitudes of a round as if there had been no GradScaler."""
    scale = facts.loss_scale
    return array("d", [magnitude / scale for magnitude in row]) if scale else row


def _tensor(row: array[float]) -> torch.Tensor:
    """As float64, of shape (parameters,); the same memory."""
    return torch.frombuffer(row, dtype=torch.float64) if row else torch.zeros(0, dtype=torch.float64)


def _worth_telling(rows: torch.Tensor) -> list[int]:
    """Places of those to tell of: those that are bad in the newest round, then those that grew most."""
    now = rows[-1]
    growth = now / rows.nanmedian(0).values.clamp(min=torch.finfo(torch.float64).tiny)
    # What is not finite comes first; zero by zero is no growth.
    growth = torch.where(now.isfinite(), growth.nan_to_num(nan=0.0), math.inf)
    return growth.argsort(descending=True, stable=True)[:TOLD].tolist()


def _flight_step(facts: RoundFacts, row: torch.Tensor, told: list[int]) -> dict[str, Any]:
    step: dict[str, Any] = {
        "round": facts.round,
        "step": facts.step,
        "magnitude": _short(row.amax().item()),
        "magnitudes": [_short(magnitude) for magnitude in row[told].tolist()],
    }
    optional = {
        "loss": facts.loss,
        "loss_scale": facts.loss_scale,
        "learning_rate": facts.learning_rate,
    }
    return step | {name: _short(value) for name, value in optional.items() if value is not None}


def _short(number: float) -> float:
    """Six digits are enough to see how it grew, and a line of the journal holds them all."""
    return float(f"{number:.6g}")
