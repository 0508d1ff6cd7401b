"""What is known of a pass that its replay can be compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gradwatch.agent.probe import replica
from gradwatch.agent.probe.autopsy.evidence import Evidence, gradient_checksum
from gradwatch.agent.probe.autopsy.graph import digest_of, is_compiled, parameters_outside
from gradwatch.agent.probe.passes import Leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from gradwatch.agent.probe.model import WatchedModel
    from gradwatch.agent.probe.passes import Pass
    from gradwatch.agent.probe.rounds import Bucket, Moment

_OURS = ("gradwatch", "torch")


def evidence_of(
    model: WatchedModel, moment: Moment, one: Pass, checksums: dict[int, int], roots: Sequence[Any] | None
) -> Evidence:
    """What is known of a pass, while its backward pass is under way.

    Args:
        model: whose it is.
        moment: the round's.
        one: the pass.
        checksums: of finite gradients, by key, as far as they were taken.
        roots: where the backward pass began; None where that is not known.
    """
    capsule = one.capsule
    if capsule is None:
        return Evidence()
    by_place = {
        place: entrance.node for entrance in one.entrances for place in entrance.ordinals if entrance.node
    }
    edges = sorted(by_place.items(), key=lambda edge: edge[0])
    inputs = Leaves((capsule.args, capsule.kwargs)).tensors
    evidence = Evidence(capsule.output)
    evidence.ordinals = [place for place, _ in edges]
    evidence.graph = digest_of([(node, capsule.numbers.get(place, 0)) for place, node in edges], inputs)
    if is_compiled(node for _, node in edges):
        evidence.doubts.append("a part of it was compiled, and is replayed as it is written")
    if len(moment.passes) > 1 or one.backward:
        evidence.doubts.append("gradients of several passes are summed up")
    else:
        places = places_of(model)
        evidence.checksums = {places[key]: checksum for key, checksum in checksums.items()}
        evidence.magnitudes = {
            places[key]: magnitude for key, magnitude in moment.magnitudes.items() if math.isfinite(magnitude)
        }
    if any(_is_the_users(hook) for parameter in model.parameters() for hook in _hooks_of(parameter)):
        evidence.doubts.append("hooks on its parameters see their gradients")
    evidence.doubts += _ways_around(model, moment, roots)
    return evidence


def places_of(model: WatchedModel) -> dict[int, int]:
    """The ordinal of each of a model's parameters by its key: the same on every rank."""
    return {key: place for place, key in enumerate(sorted(model.keys))}


def weights_of(model: WatchedModel) -> list[int] | None:
    """The checksum of a model's parameters as they are now; None where each rank holds others."""
    parameters = model.parameters()
    return replica.sums_of(parameters).tolist() if model.replicates and parameters else None


def take_checksums(bucket: Bucket, magnitudes: dict[int, float], checksums: dict[int, int]) -> None:
    """Of the finite gradients in a bucket, before it is reduced."""
    for key, gradient in bucket.gradients():
        if math.isfinite(magnitudes.get(key, math.nan)):
            taken = gradient_checksum(gradient)
            if taken is not None:
                checksums[key] = taken


def _ways_around(model: WatchedModel, moment: Moment, roots: Sequence[Any] | None) -> list[str]:
    if not roots:
        return ["where its backward pass began is not known"]
    entrances = [entrance.node for one in moment.passes for entrance in one.entrances]
    if None in entrances or not entrances:
        return ["by which operators gradients entered it is not known"]
    outside = parameters_outside(roots, entrances)
    own = outside if model.shards is not None else outside & model.parameter_ids
    return ["gradients reached its parameters by another way than its output"] if own else []


def _hooks_of(parameter: torch.Tensor) -> Iterable[Any]:
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        yield from (getattr(parameter, name, None) or {}).values()


def _is_the_users(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "")).partition(".")[0] not in _OURS
