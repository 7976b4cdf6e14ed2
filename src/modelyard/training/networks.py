"""The built-in networks. This file and fit.py import torch at the top; everybody else imports them at use."""

import torch
from torch import Tensor, nn


class TableNetwork(nn.Module):
    """A multilayer perceptron over the preprocessed matrix."""

    def __init__(self, n_features: int, hidden: tuple[int, ...], n_outputs: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = n_features
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, n_outputs))

    def forward(self, x: Tensor) -> Tensor:  # (n, n_features) float32 → (n, n_outputs)
        out: Tensor = self.layers(x)
        return out


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut; batch norm folds into the convolutions on export."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:  # (n, n_in, h, w) → (n, n_out, h / stride, w / stride)
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class ImageNetwork(nn.Module):
    """A small residual network over decoded pixels; scaling them is its first step, so it travels with the weights.

    Source: He et al., Deep Residual Learning (2016), in miniature.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Tensor, std: Tensor, channels: tuple[int, ...], n_outputs: int, dropout: float
    ) -> None:  # mean, std: (c,) of pixels in [0, 1]
        super().__init__()
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        stem = channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(len(mean), stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        width = stem
        for position, size in enumerate(channels):
            blocks.append(ResidualBlock(width, size, stride=1 if position == 0 else 2))
            width = size
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:  # (n, h, w, c) uint8 → (n, n_outputs)
        scaled = (x.permute(0, 3, 1, 2).to(torch.float32) / 255 - self.mean) / self.std
        features = self.blocks(self.stem(scaled)).mean(dim=(2, 3))  # (n, channels[-1])
        out: Tensor = self.head(self.dropout(features))
        return out


class Rescaled(nn.Module):
    """A regression network that works on standardised values and answers in the label's own unit."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Tensor, std: Tensor) -> None:  # mean, std: scalars
        super().__init__()
        self.module = module
        self.register_buffer("mean", mean.to(torch.float32))
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)).to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x) * self.std + self.mean
        return out
