"""The task `digits`: a small vision transformer on scikit-learn's 1,797 digits of 8 x 8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._task import Data, Recipe, Task

DIM, LAYERS, HEADS = 64, 4, 4
TOKENS = 7 * 7
RECIPE = Recipe(epochs=10, batch=128, learning_rate=4e-3, weight_decay=0.05)
MEAN, STD = 4.9, 6.0  # of the pixels, which are 0 to 16
TEST_SHARE = 4  # a fourth of the digits is for the test


class SmallViT(nn.Module):
    """Overlapping patches of 4 x 4 pixels, and PyTorch's own encoder layers with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, DIM, kernel_size=4, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, DIM))
        layer = nn.TransformerEncoderLayer(
            DIM, HEADS, dim_feedforward=4 * DIM, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        layer.dropout.p = 0.1  # between GELU and the second Linear, which so does not keep GELU's output
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def digits() -> Task:
    """The digits, always split in the same way, and a ViT."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor((pixels - MEAN) / STD, dtype=torch.float32).view(-1, 1, 8, 8)
    data = Data(images, torch.tensor(labels))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    test, train = data[order[: len(data) // TEST_SHARE]], data[order[len(data) // TEST_SHARE :]]
    return Task(f"a ViT of {LAYERS} layers on {len(train):,} digits", SmallViT, train, test, RECIPE)
