"""The task `digits`: a small vision transformer on scikit-learn's 1,797 digits of 8 x 8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._task import Data, Recipe, Task

DIM, LAYERS, HEADS = 64, 4, 4
SIDE = 8
RECIPE = Recipe(epochs=8, batch=128, learning_rate=2e-3, weight_decay=0.05)
QUARTER = 4  # a fourth of the digits is for the test


class SmallViT(nn.Module):
    """Every pixel is a token: 64 of them, and stock PyTorch's own encoder layers with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(SIDE * SIDE, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, dim_feedforward=4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding(images.flatten(1).unsqueeze(-1)) + self.position
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def digits() -> Task:
    """The digits, split always in the same way, and a ViT."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, SIDE, SIDE), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // QUARTER], order[len(x) // QUARTER :]
    title = f"a ViT of {LAYERS} layers on {len(train):,} digits"
    return Task(title, SmallViT, Data(x[train], y[train]), Data(x[test], y[test]), RECIPE)
