"""A small convolutional classifier of images, whose last hidden layer serves as features where nothing better fits the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["classifier", "train_classifier"]


def classifier(shape: Sequence[int], classes: int, features: int = 64, seed: int = 0) -> nn.Sequential:
    """Images [N, C, H, W] to logits [N, classes]; without its last layer, net[:-1], to `features` numbers.

    3x3 convolutions, max-pooled by 2 until a side is below 8. The weights are a function of the seed.

    Raises:
        ValueError: not an image of at least 4 x 4, or fewer than two classes.
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ValueError(f"shape is {list(shape)}; wanted (C, H, W) of at least 4 x 4")
    if classes < 2 or features < 1:
        raise ValueError(f"classes is {classes}, features {features}; wanted at least 2 and 1")
    channels, height, width = shape
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for out in (32, 64, 64, 64, 64):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            if not layers[2:]:
                layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU()]
            channels = out
            if min(height, width) < 8:
                break
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(channels * height * width, features), nn.ReLU(), nn.Linear(features, classes)]
    return nn.Sequential(*layers)


def train_classifier(net: nn.Module, x: Tensor, labels: Tensor, epochs: int, batch: int = 64, seed: int = 0) -> None:
    """Cross-entropy by AdamW (rate 1e-3, weight decay 1e-2) over `epochs` passes in an order that is a function of the seed.

    Args:
        net: images to logits, trained in place.
        x: [N, C, H, W] float, in the model's range.
        labels: [N] int64.
        epochs: passes over the data.
        batch: images a step.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimizer.step()
