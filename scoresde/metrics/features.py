"""What turns images into the vectors that a Fréchet distance compares."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from scoresde.pieces import raw

__all__ = ["Features", "ModuleFeatures"]


@runtime_checkable
class Features(Protocol):
    """A fixed map from images to vectors, with a name and a hash that stand beside every number made with it."""

    @property
    def name(self) -> str:
        """What the extractor is called in tables."""
        ...

    @property
    def sha256(self) -> str:
        """The hash of its weights, 64 hexadecimal digits."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features [N, D] of images [N, C, H, W], floats in the data's own range."""
        ...


class ModuleFeatures:
    """The features that a module computes, frozen: a copy in eval mode, without gradients, a batch at a time.

    Args:
        name: what tables call it.
        module: maps [N, C, H, W] to [N, D]; copied, so that later training changes neither features nor hash.
        batch: images a call; the features do not depend on it (to rounding).

    Raises:
        TypeError, ValueError: an argument is not what is said above, or a batch norm without running statistics, which
            would make an image's features depend on its neighbours.
    """

    def __init__(self, name: str, module: nn.Module, batch: int = 512) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}; wanted a word for the tables, as in 'digits-cnn'")
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is {type(module).__name__}; wanted an nn.Module from images to [N, D]")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch is {batch!r}; wanted an integer of at least 1, as in 512")
        for path, layer in module.named_modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and layer.running_mean is None:
                raise ValueError(f"{path or 'module'} normalises by the batch; wanted track_running_stats=True")
        self.name = name
        self.batch = batch
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.sha256 = _sha256(self.module.state_dict())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features [N, D], on the CPU in the module's dtype.

        Args:
            images: [N, C, H, W] float, N >= 1, in the data's own range; moved to the module's device and dtype.

        Raises:
            TypeError, ValueError: images, or what the module makes of them, are not what is said above.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            came = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images are {came}; wanted a float tensor [N, C, H, W] in the data's own range")
        if images.ndim != 4 or not len(images):
            raise ValueError(f"images have shape {list(images.shape)}; wanted [N, C, H, W] with N >= 1: images[None]")
        like = next(self.module.parameters(), images)
        features = torch.cat([self.module(rows.to(like)).cpu() for rows in images.split(self.batch)])
        if features.ndim != 2 or len(features) != len(images):
            came, wanted = list(features.shape), f"[{len(images)}, D]"
            raise ValueError(f"{self.name} returned {came}; wanted {wanted}: end the module with nn.Flatten()")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{self.name} returned NaN or infinite features; wanted finite ones: check the images' range")
        return features


def _sha256(state: dict[str, Any]) -> str:
    """Return the hash of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(raw(value))
    return digest.hexdigest()
