"""Whether a replay has repeated the pass: what is kept of it to be compared with, and the comparison.

To the bit, and only what was finite then: what was not is what the replay is there to explain.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.agent.probe import replica, scan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A copy of an output up to this size is kept, such as of a loss: its checksum takes several operators.
_COPIED_BYTES = 256


@dataclass
class OutputRecord:
    """One tensor of a pass's output.

    Attributes:
        dtype: its own.
        shape: its own.
        checksum: of its bits, where all of it was finite: int64 of shape (), on its device.
        values: the tensor, where it was not.
        copy: of a small one that was finite, in place of its checksum until that is asked for.
    """

    dtype: str
    shape: tuple[int, ...]
    checksum: torch.Tensor | int | None = None
    values: torch.Tensor | None = None
    copy: torch.Tensor | None = None

    def known_checksum(self) -> int | None:
        """The checksum; None where not all of it was finite."""
        if self.checksum is None and self.copy is not None:
            self.checksum = replica.bits(self.copy)
        return None if self.checksum is None else int(self.checksum)

    def equals(self, tensor: torch.Tensor) -> bool | None:
        """Whether what was finite came again; None where nothing was."""
        if (str(tensor.dtype), tuple(tensor.shape)) != (self.dtype, self.shape):
            return False
        if self.values is None:
            then = self.known_checksum()
            return None if then is None else int(replica.bits(tensor)) == then
        finite = torch.isfinite(self.values)
        if not finite.any():
            return None
        return bool(
            int(replica.bits(tensor.detach()[finite])) == int(replica.bits(self.values[finite]))
            and torch.equal(tensor.detach()[finite], self.values[finite])
        )


def record_of(tensors: Sequence[torch.Tensor], *, finite: bool | None) -> list[OutputRecord] | None:
    """What is kept of an output.

    Args:
        tensors: of the output, in their order.
        finite: whether all of them are; None where the host does not know.

    Returns:
        None where one cannot be compared.
    """
    records = []
    for tensor in tensors:
        if tensor.layout != torch.strided or not (tensor.is_cpu or tensor.is_cuda):
            return None
        known = str(tensor.dtype), tuple(tensor.shape)
        if finite is False and not scan.is_finite(tensor):
            records.append(OutputRecord(*known, values=tensor.detach()))
        elif tensor.numel() * tensor.element_size() <= _COPIED_BYTES:
            records.append(OutputRecord(*known, copy=tensor.detach().clone()))
        else:
            records.append(OutputRecord(*known, checksum=checksum(tensor)))
    return records


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """As `replica.bits`, by the shortest way there is: it is taken of each output."""
    if tensor.is_contiguous() and tensor.numel() * tensor.element_size() % 8 == 0 and not tensor.is_complex():
        values = tensor.detach()
        if values.storage_offset() * values.element_size() % 8 == 0:
            return values.view(-1).view(torch.int64).sum()
    return replica.bits(tensor)


@dataclass
class Evidence:
    """What is known of a pass, to compare its replay with.

    Attributes:
        outputs: what left it; None where that is not known.
        graph: digest of its autograd graph; "" where that is not known.
        ordinals: of the tensors in the output by which gradients entered it.
        checksums: of finite gradients, by ordinal of the parameter.
        magnitudes: the largest in other gradients, likewise; several that share one were looked at together.
        weights: checksums of the parameters; None where they are the same ones.
        doubts: what speaks against it from the start.
    """

    outputs: list[OutputRecord] | None = None
    graph: str = ""
    ordinals: list[int] = field(default_factory=list)
    checksums: dict[int, int] = field(default_factory=dict)
    magnitudes: dict[int, float] = field(default_factory=dict)
    weights: list[int] | None = None
    doubts: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """What another rank gets: tensors and plain values."""
        outputs = (
            None
            if self.outputs is None
            else [[one.dtype, [*one.shape], one.known_checksum(), one.values] for one in self.outputs]
        )
        plain: dict[str, Any] = {**vars(self), "outputs": outputs}
        return plain

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Evidence:
        """What another rank has given."""
        outputs = (
            None
            if plain["outputs"] is None
            else [
                OutputRecord(dtype, tuple(shape), number, values)
                for dtype, shape, number, values in plain["outputs"]
            ]
        )
        return cls(**{**plain, "outputs": outputs})


@dataclass
class Verdict:
    """Whether a replay has repeated its pass.

    Attributes:
        doubts: why that is not shown: phrases.
        compared: whether there was something finite to compare.
        hidden: why it is not shown by a clean pass either, where nothing of the output was finite: phrases.
    """

    doubts: list[str] = field(default_factory=list)
    compared: bool = True
    hidden: list[str] = field(default_factory=list)

    def as_fields(self) -> dict[str, Any]:
        """Fields of the `Autopsy` message in its JSON mapping."""
        if self.doubts:
            return {"faithful": False, "doubts": list(dict.fromkeys(self.doubts))}
        return {"faithful": True} if self.compared else {}


def compare_outputs(evidence: Evidence, leaves: Sequence[torch.Tensor], verdict: Verdict) -> None:
    """Compare what left the model."""
    records = evidence.outputs
    if records is None:
        # Of a pass that is doubtful anyhow it is not.
        verdict.doubts += [] if verdict.doubts else ["its output was not kept"]
    elif len(records) != len(leaves):
        verdict.doubts.append("its output had other parts")
    else:
        equal = [one.equals(leaf) for one, leaf in zip(records, leaves, strict=True)]
        if False in equal:
            verdict.doubts.append("the finite part of its output came out otherwise")
        if True not in equal:
            verdict.compared = False
            verdict.doubts += verdict.hidden


def compare_graphs(evidence: Evidence, graph: str, verdict: Verdict) -> None:
    """Compare digests of the autograd graphs."""
    if not evidence.graph:
        verdict.doubts.append("the operators that ran are not known")
    elif evidence.graph != graph:
        verdict.doubts.append("other operators ran")


def gradient_checksum(gradient: torch.Tensor) -> int | None:
    """Of a gradient that was added to zeros, or was not; None for one that is not dense."""
    # The negative zero of a gradient that was added to 0 is none.
    return int(replica.bits(gradient + 0)) if gradient.layout == torch.strided else None


def compare_gradients(
    evidence: Evidence, gradients: Mapping[int, torch.Tensor | None], verdict: Verdict
) -> None:
    """Compare what came to the parameters.

    Args:
        evidence: of the pass.
        gradients: of the replay, by ordinal of the parameter.
        verdict: is told what differs.
    """
    equal = [
        checksum == (None if (gradient := gradients.get(place)) is None else gradient_checksum(gradient))
        for place, checksum in evidence.checksums.items()
    ]
    together: dict[float, list[int]] = {}
    for place, magnitude in evidence.magnitudes.items():
        if place not in evidence.checksums:
            together.setdefault(magnitude, []).append(place)
    for magnitude, places in together.items():
        found = [gradient for place in places if (gradient := gradients.get(place)) is not None]
        equal.append(max(map(scan.magnitude, found), default=0.0) == magnitude)
    if not all(equal):
        verdict.doubts.append("gradients of its parameters came out otherwise")
    verdict.compared = verdict.compared and bool(equal)
