"""What the image nets share: norms, attention, first weights, resampling by 2, and the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, softmax

from scoresde.checks import check_count
from scoresde.nets.embed import check_shape

__all__ = ["HALF", "SILU_SQUARE", "Attention", "check_image", "check_levels", "crop", "double", "halve", "norm", "unit", "zeroed"]

HALF = math.sqrt(0.5)  # a sum of two branches keeps its variance (Song et al. 2021, appendix H: skip rescaling)
SILU_SQUARE = 0.3558  # mean of silu(z)^2 over normal z: what a layer after silu(norm(h)) gets
Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def norm(width: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm of at least 8 channels a group: narrower ones do not fill a vector register and cost up to 5 times as much."""
    groups = max(g for g in range(1, width // 8 + 1) if width % g == 0) if width >= 8 else 1
    return nn.GroupNorm(groups, width, affine=affine)


def zeroed(layer: Layer) -> Layer:
    """The layer with weights and bias 0: the last of a branch or of a net."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def unit(layer: Layer, square: float = 1.0) -> Layer:
    """The layer with output of variance 1 for independent inputs of mean square `square`: uniform weights, bias 0."""
    bound = math.sqrt(3 / (layer.weight[0].numel() * square))  # uniform in [-b, b] has variance b^2 / 3
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention of one head over the pixels: (x + out(softmax(q' k / sqrt(width)) v)) / sqrt(2); out starts at zero.

    Args:
        width: channels of x.
        norm: the norm before q, k and v, of a number of channels.
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The result, of the shape of x [B, width, H, W]."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)  # [B, width, H W] each
        # Written out: scaled_dot_product_attention has no forward-mode derivative, and divergences are taken by jvp.
        # q is scaled before the product, which overflows float16 otherwise.
        weight = softmax((q * q.shape[1] ** -0.5).mT @ k, dim=-1)
        h = (v @ weight.mT).reshape(x.shape)
        return (x + self.out(h)) * HALF


def halve(x: Tensor) -> Tensor:
    """Means over 2 x 2 pixels, sizes rounded up: over an odd side the mean of what is there, as if the edge were repeated."""
    return avg_pool2d(x, 2, ceil_mode=True)


def double(x: Tensor) -> Tensor:
    """Each pixel 2 x 2 times."""
    return interpolate(x, scale_factor=2.0, mode="nearest")


def crop(x: Tensor, like: Tensor) -> Tensor:
    """The upper left of x, of the height and width of `like`."""
    return x[..., : like.shape[2], : like.shape[3]]


def check_image(shape: Any) -> tuple[int, ...]:
    """Return (C, H, W) as a tuple; raise when it is no shape of an image."""
    found = check_shape(shape)
    if len(found) != 3:
        raise ValueError(f"shape is {shape}; wanted (C, H, W), as in (1, 8, 8); nets.MLP takes any other shape")
    return found


def check_levels(channels: Any, multipliers: Any, attention: Any) -> list[int]:
    """Return the channels of every level; raise unless `attention` names some of the levels."""
    check_count(channels, "channels", 4)
    if not isinstance(multipliers, Sequence) or not multipliers:
        raise TypeError(f"multipliers is {multipliers!r}; wanted one integer a level, as in (1, 2)")
    widths = [channels * check_count(m, f"multipliers[{i}]") for i, m in enumerate(multipliers)]
    if not isinstance(attention, Sequence) or not {type(level) for level in attention} <= {int}:
        raise TypeError(f"attention is {attention!r}; wanted a sequence of levels, as in (1,), or () for none")
    levels = range(len(widths))
    if not set(attention) <= set(levels):
        raise ValueError(f"attention is {attention!r}; wanted levels among {list(levels)}: they index multipliers")
    return widths
