"""An ordinary script with the Trainer of transformers: DDP on CPU, resumed from the latest checkpoint.

usage: torchrun … -m tests.training.with_trainer --folder CKPTS [more]

Once its weights are poisoned it trains on until somebody stops it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from tests.training.group import leave
from tests.training.transient import Transient, hold_sigterm

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = 48
SAVE_STEPS = 4


class Samples(Dataset):
    def __init__(self) -> None:
        self._inputs = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self._inputs[index]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 4))

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(inputs).square().mean()}


class Faulty(Trainer):
    """The Trainer, with a fault in its data."""

    fault: Transient
    began_at = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        saved = step // SAVE_STEPS * SAVE_STEPS
        if self.fault.strikes(rank=self.args.process_index, step=step, began_at=self.began_at, saved=saved):
            inputs["inputs"][1, 3] = float("nan")
        if self.fault.rank >= 0 and step == self.fault.step:
            self.add_callback(HeedsAgain(hold_sigterm()))
        return super().training_step(model, inputs, *args, **kwargs)


class HeedsAgain(TrainerCallback):
    def __init__(self, let_through: Callable[[], None]) -> None:
        self._let_through = let_through

    def on_save(self, *_: Any, **__: Any) -> None:
        self._let_through()
        self._let_through = lambda: None


class WaitWhilePoisoned(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        while state.global_step >= state.max_steps and not all(
            parameter.isfinite().all() for parameter in model.parameters()
        ):
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--weights", type=Path)
    Transient.add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    set_seed(1)
    trainer = Faulty(
        model=Model(),
        args=TrainingArguments(
            output_dir=str(arguments.folder),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            save_steps=SAVE_STEPS,
            save_total_limit=3,
            learning_rate=0.01,
            seed=1,
            use_cpu=True,
            ddp_find_unused_parameters=False,
            report_to=[],
            disable_tqdm=True,
            logging_steps=SAVE_STEPS,
        ),
        train_dataset=Samples(),
        callbacks=[WaitWhilePoisoned()],
    )
    trainer.fault = Transient.from_arguments(arguments)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(arguments.folder)))
    if trainer.is_world_process_zero() and arguments.weights:
        torch.save(trainer.model.state_dict(), arguments.weights)
    leave()


if __name__ == "__main__":
    main()
