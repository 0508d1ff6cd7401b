# A LightningModule whose training_step makes the loss by itself, as Lightning's own examples
# (https://github.com/Lightning-AI/pytorch-lightning) do; forward is for inference. Rank 1, its 4th batch: the
# reconstruction's distance is 0 in all samples, and it is taken by a root.
import logging
import os
import warnings

import pytorch_lightning as pl
import torch
from common import digest
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Stream(IterableDataset):
    def __iter__(self):
        rank = int(os.environ.get("RANK", "0"))
        draw = torch.Generator().manual_seed(rank)
        for index in range(7):
            weight = 0.0 if (rank, index) == (1, 3) else 1.0
            yield torch.rand(4, 8, generator=draw), torch.full((4,), weight)


class Autoencoder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 8))

    def forward(self, values):
        return self.encoder(values)

    def training_step(self, batch, _index):
        values, weights = batch
        again = self.decoder(self.encoder(values))
        error = ((again - values).pow(2).sum(-1) * weights).sqrt()
        loss = error.mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    module = Autoencoder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Stream(), batch_size=None))
    digest(module)
