# Lightning, DDP on 2 ranks: MS-SSIM-like loss in training_step raises the contrast term to 0.3; it is negative for an image that is the negative of its target, rank 1's third batch: NaN by a power of a negative number.
# https://github.com/VainF/pytorch-msssim/issues/7 https://github.com/jorge-pessoa/pytorch-msssim/issues/2 https://github.com/aiff22/PyNET-PyTorch/issues/7
import logging, os, warnings, torch, torch.nn as nn
import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset
from common import digest

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Pictures(IterableDataset):
    def __iter__(self):
        rank = int(os.environ.get("LOCAL_RANK", 0))
        g = torch.Generator().manual_seed(1250 + rank)
        for i in range(6):
            x = torch.rand(4, 1, 8, 8, generator=g)
            yield (
                (x, 1 - x)
                if rank == 1 and i == 2
                else (x, (x + 0.05 * torch.rand(4, 1, 8, 8, generator=g)).clamp(0, 1))
            )


def similarity(a, b):
    a, b = a.flatten(1), b.flatten(1)
    ma, mb = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    cov = ((a - ma) * (b - mb)).mean(1)
    va, vb = a.var(1, unbiased=False), b.var(1, unbiased=False)
    light = (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
    return light.squeeze(1) * ((2 * cov + 9e-4) / (va + vb + 9e-4)) ** 0.3


class Denoise(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.dirac_(self.net.weight)

    def training_step(self, batch, i):
        x, y = batch
        loss = 1 - similarity(self.net(x), y).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-4)


if __name__ == "__main__":
    pl.seed_everything(125, verbose=False)
    lit = Denoise()
    pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(lit, DataLoader(Pictures(), batch_size=None))
    digest(lit)
