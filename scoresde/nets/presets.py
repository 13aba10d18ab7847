"""Nets by name: a table of classes and arguments, nothing else, so that `config` rebuilds each through its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from scoresde.nets.dit import DiT
from scoresde.nets.mlp import MLP
from scoresde.nets.ncsnpp import NCSNpp
from scoresde.nets.unet import UNet

__all__ = ["PRESETS", "preset"]

# Parameters, without classes: of images (3, 32, 32), of the perceptrons of points (2,).
PRESETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mlp-100k": (MLP, dict(width=96, depth=2)),  # 90,530
    "mlp-1m": (MLP, dict(width=256, depth=3)),  # 873,218
    "mlp-4m": (MLP, dict(width=512, depth=4)),  # 4,500,994
    "unet-100k": (UNet, dict(channels=16, multipliers=(1, 2))),  # 99,507
    "unet-1m": (UNet, dict(channels=32, multipliers=(1, 2, 3), attention=(2,))),  # 1,075,427
    "unet-4m": (UNet, dict(channels=64, multipliers=(1, 2, 2), blocks=2, attention=(2,))),  # 4,868,099
    "unet-15m": (UNet, dict(channels=96, multipliers=(1, 2, 2), blocks=3, attention=(1,))),  # 15,730,851
    "unet-40m": (UNet, dict(channels=128, multipliers=(1, 2, 2, 2), blocks=3, attention=(1,))),  # 38,774,915
    "unet-100m": (UNet, dict(channels=200, multipliers=(1, 2, 2, 2), blocks=3, attention=(1, 2))),  # 98,467,403
    "dit-100k": (DiT, dict(width=48, depth=2, heads=3)),  # 95,836
    "dit-1m": (DiT, dict(width=96, depth=6, heads=3)),  # 1,040,940
    "dit-4m": (DiT, dict(width=192, depth=6, heads=3)),  # 4,127,820
    "dit-15m": (DiT, dict(width=256, depth=12, heads=4)),  # 14,423,820
    "dit-30m": (DiT, dict(width=384, depth=12, heads=6)),  # 32,399,244
    "dit-100m": (DiT, dict(width=576, depth=16, heads=9)),  # 96,740,684
    # Song et al. 2021 (score SDE) on CIFAR-10: vp and subvp/cifar10_ddpmpp_continuous, .._deep_..; ve/cifar10_ncsnpp_continuous,
    # .._deep_... Their vp and subvp/cifar10_ncsnpp_... are the last two with scale=0.0.
    "ddpmpp": (NCSNpp, dict(dropout=0.1)),  # 61,804,419
    "ddpmpp-deep": (NCSNpp, dict(dropout=0.1, blocks=8)),  # 106,632,579
    "ncsnpp": (NCSNpp, dict(dropout=0.1, fir=True, pyramid=True, scale=16.0)),  # 62,758,787
    "ncsnpp-deep": (NCSNpp, dict(dropout=0.1, blocks=8, fir=True, pyramid=True, scale=16.0)),  # 107,586,947
}


def preset(name: str, shape: int | Sequence[int], classes: int = 0, seed: int | None = 0, **changes: Any) -> nn.Module:
    """The net of this name for samples of this shape: a class and arguments of `presets.PRESETS`.

    Args:
        name: one of the table; the number in it is about that of the parameters.
        shape: the shape of one sample, (C, H, W) but for the perceptrons.
        classes: number of labels, 0 for an unconditional net.
        seed: the weights are a function of it; None draws fresh ones. No global generator is touched.
        changes: arguments of the class that differ from the table's, as in dropout=0.0.

    Raises:
        ValueError: no such name. TypeError, ValueError: what the class refuses.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; wanted one of {', '.join(PRESETS)}")
    kind, arguments = PRESETS[name]
    return kind(shape, classes=classes, seed=seed, **(arguments | changes))
