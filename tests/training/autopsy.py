"""Micro-batches that go bad in one operator each, one case after the other, in one process group.

usage: python -m tests.training.autopsy OUTPUT MODE

The fault is in the data of rank 1 in the last step of each case, whose update is left out: on the host by the
script, on a device, for which this CPU stands, by the guard. OUTPUT.RANK gets that rank's watermark at the
time of each replay.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.agent.probe.autopsy import on_device, replayer
from tests.training.autopsy_blocks import (
    WIDTH,
    Attention,
    Block,
    Broken,
    Checkpointed,
    Endless,
    Exp,
    Log,
    Luck,
    MaskedLog,
    Normed,
    Opaque,
    Ratio,
    Reentrant,
    Spoiling,
    Sqrt,
    Suicidal,
    Synchronized,
    Transient,
)
from tests.training.group import process_group
from tests.training.late import late_device_look

STEPS = 3
BAD_STEP = STEPS - 1
NAN = float("nan")


@dataclass
class Batch:
    values: torch.Tensor


class Net(nn.Module):
    def __init__(self, block: type[Block], output: str) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.block = block()
        self.last = nn.Linear(WIDTH, 3)
        self.output = output

    def forward(self, batch: Any, ballast: torch.Tensor | None = None) -> Any:
        if isinstance(batch, Batch):
            values = batch.values
        elif isinstance(batch, torch.Tensor):
            values = batch.float()
        else:
            values = next(batch)
        mixed = self.body(self.first(values))
        # What is 0 or large in the input is so after the layers, too.
        values = torch.where((values == 0) | (values > 100), mixed * 0 + values, mixed)
        result = self.last(self.block(values))
        if self.output == "masked":
            # Infinities on purpose.
            return result, result.masked_fill(torch.eye(4, 3, dtype=torch.bool), float("-inf"))
        return Opaque(result) if self.output == "opaque" else result


def values_of(rank: int, step: int, micro: int, fill: float | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    values = torch.randn(4, WIDTH, generator=generator)
    if fill is not None:
        values[1] = fill
    return values


def tokens(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values == 0, 0, (values.abs() * 10).long() + 1)


FORWARD = {"phase": "PHASE_FORWARD", "module": "block"}
BACKWARD = {"phase": "PHASE_BACKWARD", "module": "block"}
LOG = {**FORWARD, "operator": "aten.log.default", "at": "log of 0"}
SQRT = {**BACKWARD, "operator": "aten.div.Tensor", "at": "its slope at 0"}
FINITE = "REPLAY_FINITE"
REPRODUCED = "REPLAY_REPRODUCED"
NOT_DONE = {"replay": "REPLAY_NOT_DONE", "other": None}

# Of a child process; and where a device's guard is off.
ON_HOST_ONLY = {"endless", "suicidal", "updated_in_backward"}
GUARD = {"GRADWATCH_GUARD": '{"on_nonfinite": "skip_step"}'}


@dataclass(frozen=True)
class Mode:
    """On what the cases run, and how.

    Attributes:
        environment: of the ranks.
        behind: how many questions the device is behind; None on the host.
        fused: the optimizer skips on the device, and some updates follow.
        cases: names of those that run; all when empty.
    """

    environment: dict[str, str]
    behind: int | None = None
    fused: bool = False
    cases: tuple[str, ...] = ()


_SOME = ("log", "sqrt", "batch_norm", "second_of_four", "synchronized", "scaler", "broken_device")
MODES = {
    "host": Mode({}),
    "device": Mode(GUARD, behind=3),
    # What the last of these stands for is over by the time of the replay.
    "fused": Mode(GUARD, behind=1, fused=True, cases=_SOME[:-1]),
    # By the time of the read-out another update has been applied.
    "too_late": Mode(GUARD, behind=3, fused=True, cases=("log",)),
    "every_step": Mode({"GRADWATCH_GUARD": '{"read_out": "every_step"}'}, behind=3, cases=_SOME),
}
# name: (options, what rank 1 should journal; `other` is rank 0's replay of it)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "log": ({"block": Log}, LOG),
    "masked_log": ({"block": MaskedLog}, {**LOG, "at": "the log that is used"}),
    "sqrt": ({"block": Sqrt}, SQRT),
    "attention": (
        {"block": Attention},
        {**FORWARD, "operator": "aten._softmax.default", "at": "without a place"},
    ),
    "exp": ({"block": Exp, "fill": 1000.0}, {**FORWARD, "operator": "aten.exp.default", "at": "of 1000"}),
    "ratio": ({"block": Ratio}, {**FORWARD, "operator": "aten.div.Tensor", "at": "0 / 0"}),
    "second_of_four": ({"block": Sqrt, "micro": 4, "bad_micro": 1}, {**SQRT, "microbatch": 1}),
    "luck": ({"block": Luck}, {**FORWARD, "operator": "aten.div.Tensor", "at": "out of luck"}),
    "function": ({"block": Spoiling}, {**BACKWARD, "operator": "aten.full_like.default", "at": "full_like"}),
    "batch_norm": ({"block": Normed}, LOG),
    "autocast": ({"block": Log, "autocast": True}, LOG),
    "checkpointed": ({"block": Checkpointed}, SQRT),
    "reentrant": ({"block": Reentrant}, {**NOT_DONE, "reason": "checkpoint", "other": "REPLAY_NOT_DONE"}),
    "compiled": ({"block": Sqrt, "compiled": True}, SQRT),
    "masked_output": ({"block": Sqrt, "output": "masked"}, SQRT),
    "tokens": ({"block": Log, "wrap": tokens}, LOG),
    "dataclass": ({"block": Log, "wrap": Batch}, {**LOG, "other": None, "missing": "holds a Batch"}),
    "consumed": ({"block": Log, "wrap": lambda v: iter([v])}, {**NOT_DONE, "reason": "list_iterator"}),
    "large": ({"block": Log, "ballast": 17 << 20}, {**NOT_DONE, "reason": "at most 64 MiB"}),
    "changed": (
        {"block": Log, "ballast": 4, "change": True},
        {**NOT_DONE, "reason": "an input was changed in place"},
    ),
    # By a fused optimizer, which no parameter's version tells of.
    "updated_in_backward": (
        {"block": Log, "in_backward": True},
        {**NOT_DONE, "reason": "the parameters were changed"},
    ),
    "no_tensor": (
        {"block": Sqrt, "output": "opaque"},
        {**NOT_DONE, "reason": "holds no tensor"},
    ),
    "torch_only": (
        {"fill": 3e38},
        {"phase": "PHASE_BACKWARD", "module": "1", "operator": "aten.mm.default", "missing": "the line"},
    ),
    "input": ({"block": Block, "fill": NAN}, {"phase": "PHASE_INPUT", "missing": "the input is not finite"}),
    "parameter": (
        {"block": Block, "poison": True},
        {"phase": "PHASE_PARAMETER", "missing": "a parameter", "other": FINITE},
    ),
    # What the graph of the loss shows is gone by the time a device is read out.
    "loss": (
        {"block": Block, "loss": "sqrt"},
        {
            **NOT_DONE,
            "reason": "the loss made it",
            "on_host": {"phase": "PHASE_LOSS", "operator": "aten.sqrt"},
        },
    ),
    "synchronized": (
        {"block": Synchronized},
        {**LOG, "missing": "c10d.allreduce_", "other": "REPLAY_RECEIVED"},
    ),
    "broken_device": ({"block": Broken}, {**FORWARD, "operator": "aten.fill_.Scalar", "other": FINITE}),
    # What the process remembers of it goes with the pass to the other rank, too.
    "transient": ({"block": Transient}, {"replay": FINITE, "other": FINITE}),
    "endless": ({"block": Endless}, {**NOT_DONE, "reason": "took too long", "other": "REPLAY_NOT_DONE"}),
    "suicidal": ({"block": Suicidal}, {**NOT_DONE, "reason": "signal 9", "other": "REPLAY_NOT_DONE"}),
    # Only the first round of a stretch.
    "stretch": ({"block": Log, "bad_from": BAD_STEP - 1}, LOG),
    "scaler": ({"block": Block, "loss": "overflow", "scaler": True}, {"replay": None, "other": None}),
}


def names_in(mode: str) -> list[str]:
    """The cases that run in a mode."""
    chosen = MODES[mode].cases or CASES
    return [name for name in chosen if mode == "host" or name not in ON_HOST_ONLY]


def net_of(options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(5)
    if "block" not in options:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    net = Net(options["block"], options.get("output", ""))
    if options.get("compiled"):
        net.block = torch.compile(net.block, backend="aot_eager")
    return net


def loss_of(output: Any, kind: str) -> torch.Tensor:
    if isinstance(output, tuple):
        output = output[0]
    values = output.take() if isinstance(output, Opaque) else output
    if kind == "sqrt":
        return (values * 0).pow(2).sum().sqrt()
    return values.pow(2).mean() * (1e30 if kind == "overflow" else 1.0)


def run(rank: int, options: dict[str, Any], mode: Mode) -> None:
    wrap = options.get("wrap", lambda values: values)
    micro_batches, bad_micro = options.get("micro", 1), options.get("bad_micro", 0)
    ddp = DistributedDataParallel(net_of(options), broadcast_buffers=False)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01, fused=mode.fused)
    if options.get("in_backward"):
        for parameter in ddp.parameters():
            own = torch.optim.SGD([parameter], lr=0.01, fused=True)
            parameter.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, enabled="scaler" in options)
    ballast = {"ballast": torch.zeros(options["ballast"])} if "ballast" in options else {}
    for step in range(STEPS + 5 * mode.fused):
        optimizer.zero_grad()
        for micro in range(micro_batches):
            badly = options.get("bad_from", BAD_STEP) <= step <= BAD_STEP
            bad = rank == 1 and badly and micro == bad_micro
            values = values_of(rank, step, micro, options.get("fill", 0.0) if bad else None)
            if bad and options.get("poison"):
                with torch.no_grad():
                    ddp.module.last.weight[0, 0] = NAN
            Broken.set_broken(bad)
            torch.manual_seed(77)
            with ddp.no_sync() if micro < micro_batches - 1 else torch.enable_grad():
                with torch.autocast("cpu", enabled=options.get("autocast", False)):
                    output = ddp(wrap(values), **ballast)
                if options.get("change"):
                    ballast["ballast"].zero_()
                scaler.scale(loss_of(output, options.get("loss", "") if bad else "")).backward()
        if mode.behind is not None or step < options.get("bad_from", BAD_STEP) or scaler.is_enabled():
            scaler.step(optimizer)
            scaler.update()
    dist.barrier()


def main(output: Path, name_of_mode: str) -> None:
    mode = MODES[name_of_mode]
    watermarks: list[int] = []

    def looked(replay: Any) -> Any:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            rank = int(os.environ["RANK"])
            (progress,) = Path(os.environ["GRADWATCH_SPOOL"]).glob(f"rank{rank:05}-*.progress")
            watermarks.append(json.loads(progress.read_text())["round"])
            return replay(*args, **kwargs)

        return replayed

    replayer.in_child = looked(replayer.in_child)
    replayer.in_process = looked(replayer.in_process)
    # However slow the machine is.
    replayer.SECONDS_IN_ALL = on_device.HELP_SECONDS = 1000.0
    if mode.behind is not None:
        late_device_look(mode.behind)
    with process_group() as rank:
        for name in names_in(name_of_mode):
            replayer.SECONDS = 3.0 if name == "endless" else 120.0
            run(rank, CASES[name][0], mode)
        output.with_suffix(f".{rank}").write_text(json.dumps(watermarks))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
