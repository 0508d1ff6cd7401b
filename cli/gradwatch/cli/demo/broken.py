"""Train as `train.py` does, with something that goes wrong on some ranks in one step.

It is told what, and does not know either that anyone watches it.

    torchrun --nproc-per-node 4 broken.py DATA --fault NAME --step N --ranks R [S …]
"""
# Without `annotations` of the future: DDP reads those of a comm hook.

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

# Run by path, as `train.py` is.
from gradwatch.cli.demo import train
from gradwatch.cli.demo.faults import BAD_MICRO_BATCH

BLOCK = "blocks.1"
MICRO_BATCHES = 4
NAN = float("nan")
# Of the first element of the last layer's gradient.
GRADIENTS = {"gradient": NAN, "two-ranks": NAN, "overflow-in-the-sum": 3e38, "frozen-parameter": 1e30}


def add_log(values: Tensor, alive: Tensor) -> Tensor:
    """The logarithm of a norm, which is -Inf for what is not alive."""
    return values + (values * alive).square().sum(-1, keepdim=True).log()


def add_root(values: Tensor, alive: Tensor) -> Tensor:
    """A norm, which is 0 for what is not alive, and has no derivative there."""
    return values + (values * alive).square().sum(-1, keepdim=True).sqrt()


def add_softmax(values: Tensor, alive: Tensor) -> Tensor:
    """A softmax that masks what is not alive: all of it."""
    return values + values.masked_fill(alive == 0, float("-inf")).softmax(-1)


def take_mean_off(module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
    """Less the mean over all ranks: a collective of the forward pass, and of the backward pass."""
    del module, given
    mean: Tensor = all_reduce(output.mean((0, 1)))  # type: ignore[no-untyped-call]
    return output - mean / dist.get_world_size()


OPERATORS = {"log-of-zero": add_log, "sqrt-of-zero": add_root, "masked-softmax": add_softmax}


def sum_then_divide(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """A comm hook that averages by a sum, which it divides when that may be too late."""
    del state
    summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    averaged: torch.futures.Future[Tensor] = summed.then(
        lambda done: done.value()[0].div_(dist.get_world_size())
    )
    return averaged


class Broken(train.Training):
    """A training that breaks.

    Args:
        length: characters in a sample.
        fault: which.
        is_due: whether it strikes here, in a step.
    """

    def __init__(self, length: int, fault: str, is_due: Callable[[int], bool]) -> None:
        super().__init__(length, None)
        self._fault = fault
        self._is_due = is_due
        self._micro_batches = MICRO_BATCHES if fault == "micro-batch" else 1
        # The loss overflows when it is scaled, in the first step, and whenever the scale has grown again.
        self._scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**127, growth_interval=5, enabled=fault == "loss-scale"
        )
        self._alive = torch.ones(())
        if fault == "shared-statistics":
            self.network.get_submodule(BLOCK).register_forward_hook(take_mean_off)
        if fault in OPERATORS:
            self.network.register_forward_pre_hook(self._see_weights)
            self.network.get_submodule(BLOCK).register_forward_hook(self._add)
        if fault == "overflow-in-the-sum":
            self.model.register_comm_hook(None, sum_then_divide)

    def learn(self, characters: Tensor, weights: Tensor) -> float:
        """One step, as `Training` has it."""
        due = self._is_due(self.step)
        number = self._micro_batches
        mean = 0.0
        self.optimizer.zero_grad()
        with self._breaking() if due else contextlib.nullcontext():
            for micro, (texts, scales) in enumerate(zip(characters.chunk(number), weights.chunk(number))):  # noqa: B905 - as many of both
                given = self._spoilt(scales, micro) if due else scales
                with self.model.no_sync() if micro < number - 1 else contextlib.nullcontext():
                    logits = self.model(texts[:, :-1], given)
                    loss = functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()) / number
                    self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                mean += float(loss.item())
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self.step += 1
        self.batches_read += 1
        return mean

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Be broken within."""
        handles = []
        weight = self.network.get_parameter(f"{BLOCK}.up.weight")
        if self._fault in GRADIENTS:
            handles.append(self.network.head.weight.register_hook(self._spoil))  # type: ignore[no-untyped-call]
        elif self._fault == "poisoned-weight":
            weight.data[0, 0] = NAN
        elif self._fault == "diverged-replica":
            weight.data[0, 0] += 0.5
        elif self._fault == "learning-rate":
            for group in self.optimizer.param_groups:
                group["lr"] = 1e30
        yield
        for handle in handles:
            handle.remove()

    def _spoilt(self, weights: Tensor, micro: int) -> Tensor:
        """The weights of a micro-batch's samples."""
        if self._fault == "shared-statistics" or (self._fault == "micro-batch" and micro == BAD_MICRO_BATCH):
            return weights * NAN
        # Of the first sample nothing is left: so every rank that is given this batch breaks.
        return weights.index_fill(0, torch.tensor([0]), 0.0) if self._fault in OPERATORS else weights

    def _see_weights(self, module: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        del module
        self._alive = given[1][:, None, None]

    def _add(self, module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        del module, given
        return OPERATORS[self._fault](output, self._alive)

    def _spoil(self, gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt[0, 0] = GRADIENTS[self._fault]
        return spoilt


def main() -> None:
    """Train through the shard once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--fault", required=True)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", required=True)
    given = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    length, batches = train.read_batches(given.data / f"shard-{rank}.bin")
    train.run(Broken(length, given.fault, lambda step: rank in given.ranks and step == given.step), batches)


if __name__ == "__main__":
    main()
