"""The models of the benchmarks: a transformer of 27 M parameters, and one of many small layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 16_384
WIDTH = 512
HEADS = 8
LAYERS = 6
TOKENS = 256
SEQUENCES = 2
SMALL_WIDTH = 64
SMALL_LAYERS = 60
SMALL_ROWS = 256


class Block(nn.Module):
    """Causal self-attention and an MLP, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden.shape
        heads = self.qkv(self.norm_1(hidden)).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return hidden + self.down(functional.gelu(self.up(self.norm_2(hidden))))


class ReferenceTransformer(nn.Module):
    """Decoder with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token; `tokens` is int64 of (batch, length + 1)."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        hidden = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = functional.linear(self.norm(hidden), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class SmallLayers(nn.Module):
    """60 layers of LayerNorm, Linear of 64 and GELU: 240 parameters, each of a few kilobytes.

    What watching costs here is the calls that it makes, not the bytes that it reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.LayerNorm(SMALL_WIDTH), nn.Linear(SMALL_WIDTH, SMALL_WIDTH), nn.GELU())
                for _ in range(SMALL_LAYERS)
            )
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Mean square of what comes out; `values` is of (rows, 64)."""
        return self.layers(values).float().square().mean()


def random_rows() -> torch.Tensor:
    """One rank's batch for `SmallLayers`."""
    return torch.randn(SMALL_ROWS, SMALL_WIDTH)


def random_batch() -> torch.Tensor:
    """Tokens of one rank's batch."""
    return torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS + 1))
