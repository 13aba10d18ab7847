"""Resampling of images by 2 through a short separable filter, as in StyleGAN2; zeros outside the image.

With taps k of even length K and sum 1, one dimension, n pixels:

    up(x)[o]   = 2 sum_i k[o - 2i + K/2 - 1] x[i],   o = 0 ... 2n - 1
    down(x)[o] =   sum_i k[2o - i + K/2] x[i],       o = 0 ... ceil(n / 2) - 1
    blur(x)[o] =   sum_i k[o - i + K/2 - 1] x[i],    o = -1 ... n - 1, n even

Inside the image, K / 2 pixels from its edges, up keeps a constant and down keeps the mean; at the edges the zeros weigh in. Of an
odd side the last row is repeated first. Every derivative, vmap and every float dtype goes through: all is one convolution.

Source: Zhang 2019 (ICML), section 3; Karras et al. 2020 (StyleGAN2), appendix B, whose gain and padding these are; Song et al.
2021 (score SDE), appendix H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from scoresde.checks import shape_of

__all__ = ["blur", "down", "up"]

BINOMIAL = (1.0, 3.0, 3.0, 1.0)


def up(x: Tensor, kernel: Sequence[float] = BINOMIAL) -> Tensor:
    """x [B, C, H, W] at twice the size, [B, C, 2H, 2W]: zeros put between the pixels, then filtered with gain 4.

    kernel: an even number of taps, scaled to sum 1; the filter is their outer product.

    Raises TypeError, ValueError when x is no batch of images or the taps are none.
    """
    taps = _taps(x, kernel)
    return conv_transpose2d(x, 4 * _weight(x, taps), stride=2, padding=len(taps) // 2 - 1, groups=x.shape[1])


def down(x: Tensor, kernel: Sequence[float] = BINOMIAL) -> Tensor:
    """x [B, C, H, W] at half the size, [B, C, ceil(H / 2), ceil(W / 2)]: filtered, then every second pixel. See `up`."""
    taps = _taps(x, kernel)
    return conv2d(_even(x), _weight(x, taps[::-1]), stride=2, padding=len(taps) // 2 - 1, groups=x.shape[1])


def blur(x: Tensor, kernel: Sequence[float] = BINOMIAL) -> Tensor:
    """x [B, C, H, W] filtered, one pixel larger than its even size: what a 3 x 3 convolution of stride 2 halves. See `up`."""
    taps = _taps(x, kernel)
    return conv2d(_even(x), _weight(x, taps[::-1]), padding=len(taps) // 2, groups=x.shape[1])


def _taps(x: Any, kernel: Sequence[float]) -> list[float]:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x is {shape_of(x)}; wanted a float tensor [B, C, H, W]: x.float()")
    if x.ndim != 4:
        raise ValueError(f"x is {shape_of(x)}; wanted [B, C, H, W]: x[None] for one image")
    total = math.fsum(kernel)
    if not kernel or len(kernel) % 2 or not math.isfinite(total) or total == 0:
        # An odd number of taps has a pixel in its middle, and a change of size by 2 has none: it would shift the image.
        raise ValueError(f"kernel is {kernel!r}; wanted an even number of finite taps with a sum other than 0, as in {BINOMIAL}")
    return [k / total for k in kernel]


def _weight(x: Tensor, taps: Sequence[float]) -> Tensor:
    # The outer product at once and not a row filter after a column filter: 2.5 times as fast in float32 (CPU, 64 channels).
    k = torch.tensor(taps, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return (k[:, None] * k).to(x.dtype).expand(x.shape[1], 1, -1, -1)


def _even(x: Tensor) -> Tensor:
    # cat and not pad: replication padding is not in every transform's table.
    x = torch.cat([x, x[..., -1:, :]], dim=2) if x.shape[2] % 2 else x
    return torch.cat([x, x[..., -1:]], dim=3) if x.shape[3] % 2 else x
