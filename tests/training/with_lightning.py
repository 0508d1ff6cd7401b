"""An ordinary Lightning script: DDP on CPU, a checkpoint per epoch, resumed with `ckpt_path`.

usage: torchrun … -m tests.training.with_lightning --folder CKPTS [--ckpt PATH] [more]

Once its weights are poisoned it trains on until somebody stops it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.training.group import leave
from tests.training.transient import Transient, hold_sigterm

SAMPLES = 32
BATCH = 4
STEPS_PER_EPOCH = SAMPLES // (2 * BATCH)


class Model(pl.LightningModule):
    def __init__(self, fault: Transient, by_hand: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        self._fault, self._by_hand = fault, by_hand
        self._step = 0
        self._saved = lambda: None
        self.began_at = 0

    def on_train_start(self) -> None:
        self._step = self.began_at = self.global_step

    def on_train_epoch_start(self) -> None:
        self._saved()
        self._saved = lambda: None

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        (inputs,) = batch
        saved = self._step // STEPS_PER_EPOCH * STEPS_PER_EPOCH
        if self._fault.strikes(rank=self.global_rank, step=self._step, began_at=self.began_at, saved=saved):
            inputs = inputs.clone()
            inputs[1, 3] = float("nan")
        if self._fault.rank >= 0 and self._step == self._fault.step:
            self._saved = hold_sigterm()
        self._step += 1
        return self.net(inputs).square().mean()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        if self._by_hand and self._step == self._fault.step:
            optimizer_closure()  # forward and backward, and no step
            return
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._step < self.trainer.max_epochs * STEPS_PER_EPOCH:
            return
        # Lightning takes a SIGTERM at the end of a batch.
        while not (self.trainer.received_sigterm or all(one.isfinite().all() for one in self.parameters())):
            time.sleep(0.02)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--ckpt")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--by-hand", action="store_true", help="leave out the bad update's step()")
    Transient.add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    data = TensorDataset(torch.randn(SAMPLES, 8))
    model = Model(Transient.from_arguments(arguments), arguments.by_hand)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=arguments.epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(dirpath=arguments.folder, save_top_k=-1, every_n_epochs=1)],
    )
    trainer.fit(model, DataLoader(data, batch_size=BATCH, shuffle=True), ckpt_path=arguments.ckpt)
    if trainer.is_global_zero and arguments.weights:
        torch.save(model.net.state_dict(), arguments.weights)
    leave()


if __name__ == "__main__":
    main()
