"""What ranks say, and what each record holds unless told otherwise."""

from __future__ import annotations

import math
from dataclasses import replace

from gradwatch.collector import observations as obs
from tests.collector.history import Told, batch, gradient, nonfinite, progress

# Magnitudes, up to the round that is bad.
GROWING = [1.0, 1.1, 0.9, 1.0, 30.0, 4e3, 6e6, math.nan]


def reduced(round_: int, *gradients: obs.BadGradient, **changes: object) -> obs.Reduced:
    known = obs.Reduced(0, round_, round_, gradients or (gradient(position=None),), len(gradients) or 1)
    return replace(known, **changes)


def overflow(round_: int, own: float | None, *, skipped: bool = False) -> obs.OptimizerState:
    return obs.OptimizerState(
        root=0,
        round=round_,
        step=round_,
        parameter="a.weight",
        module="a",
        module_class="Linear",
        dtype="float32",
        numel=10,
        magnitude=1e30,
        limit=5.8e20,
        local_magnitude=own,
        parameters_total=1,
        optimizer="AdamW",
        skipped=skipped,
        batch=None,
    )


def bad_weights(
    round_: int, evidence: obs.UpdateEvidence | None, *names: str, **changes: object
) -> obs.BadWeights:
    known = obs.BadWeights(
        root=0,
        round=round_,
        step=round_,
        model_step=None,
        weights=tuple(obs.BadWeight(name, obs.Value.NAN, 3, 40) for name in names or ("0.weight",)),
        weights_total=len(names) or 1,
        evidence=evidence,
        gradients=(),
        gradients_total=0,
        optimizer="Adam",
        eps=1e-8,
        learning_rate=1e-3,
        finite_step=None,
        batch=None,
        initial=False,
    )
    return replace(known, **changes)


def autopsy(of_rank: int, round_: int, replay: obs.Replay, **changes: object) -> obs.Autopsy:
    known = obs.Autopsy(
        root=0,
        round=round_,
        step=round_,
        microbatch=0,
        of_rank=of_rank,
        replay=replay,
        reason="",
        phase=obs.Phase.FORWARD,
        operator="aten.log.default",
        module="head",
        module_class="Head",
        source="train.py:42",
        code="return p.log()",
        inputs=(obs.OperatorInput("float32", (4, 3), 0.0, 3.25, 0),),
        value=obs.Value.NEGATIVE_INFINITY,
        missing=(),
        seconds=0.1,
        nbytes=100,
    )
    return replace(known, **changes)


def checksum(round_: int, *sums: int, step: int | None = None) -> obs.Checksum:
    return obs.Checksum(0, round_, round_ if step is None else step, 4, sums)


def model(*names: str) -> obs.ModelSeen:
    parameters = tuple(
        obs.Parameter(name, name.rpartition(".")[0], "Linear", (2,), "float32") for name in names
    )
    return obs.ModelSeen(0, "Net", "DistributedDataParallel", 2, 8, parameters)


def told_of(rank: int, round_: int, *bodies: obs.Body, **changes: object) -> list[obs.Batch | obs.Progress]:
    """A rank's records, and its progress after the round."""
    bad = len({body.round for body in bodies if isinstance(body, obs.NonFinite)})
    known = {"bad_rounds": bad, "last_bad_round": round_} | changes
    parts: list[obs.Batch | obs.Progress] = [batch(f"r{rank}", 1, *bodies)] if bodies else []
    return [*parts, progress(f"r{rank}", round_ + 1, 1 + len(bodies), **known)]


def bad_on(rank: int, *more: obs.Body, world_size: int = 3) -> Told:
    told = Told().hellos(world_size)
    told.tell(*told_of(rank, 5, nonfinite(5, phase=obs.Phase.FORWARD), *more))
    for other in range(world_size):
        if other != rank:
            told.tell(*told_of(other, 5, reduced(5)))
    return told


def flight(round_: int, magnitudes: list[float], rates: list[float] | None = None) -> obs.Flight:
    steps = tuple(
        obs.FlightStep(
            round=round_ - len(magnitudes) + 1 + place,
            step=round_ - len(magnitudes) + 1 + place,
            loss=1.0,
            loss_scale=None,
            learning_rate=None if rates is None else rates[place],
            magnitude=magnitude,
            magnitudes=(magnitude,),
        )
        for place, magnitude in enumerate(magnitudes)
    )
    return obs.Flight(0, round_, round_, ("a.weight",), steps, 3.4e38, "float32")
