"""The classifier in PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from digits.config import Config
from natten import NeighborhoodAttention2D


class Block(nn.Module):
    """Neighborhood attention, then a two-layer MLP, each on a residual branch."""

    def __init__(self, config: Config, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = NeighborhoodAttention2D(
            config.dim,
            config.num_heads,
            config.kernel_size,
            dilation=dilation,
            rel_pos_bias=True,
        )
        self.norm2 = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Classifier(nn.Module):
    """[batch, size, size, 1] -> logits [batch, classes].

    A convolution turns pixels into tokens, blocks mix them, and a linear map reads all tokens at
    their places (the mean over tokens would lose where a stroke is).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, config.dim, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(Block(config, dilation) for dilation in config.dilations)
        self.norm = nn.LayerNorm(config.dim)
        self.head_drop = nn.Dropout(config.head_drop)
        self.head = nn.Linear(config.size**2 * config.dim, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.movedim(-1, 1)).movedim(1, -1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.head_drop(self.norm(x).flatten(1)))
