"""DDPM++ and NCSN++, the image networks of the score-SDE paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

import scoresde.nets.fir as filters
from scoresde.checks import check_count, check_even, check_number
from scoresde.nets.blocks import HALF, SILU_SQUARE, Attention, check_image, check_levels, crop, double, halve, unit, zeroed
from scoresde.nets.embed import Conditioning, Net, fourier, gaussian, seeded

__all__ = ["NCSNpp"]

Resample = Callable[[Tensor], Tensor]


class NCSNpp(Net):
    """U-Net of residual blocks that resample inside: DDPM++ with `fir` and `pyramid` off, NCSN++ with both on, deep with 8 blocks.

    Level l has channels * multipliers[l] channels at 1 / 2^l of the size. On the way down there is a skip after the first
    convolution, after every block and after every halving; on the way up, blocks + 1 blocks a level each take one. A sum of two
    branches is divided by sqrt(2), and the branches start at variance 1, so that activations keep theirs at any depth. The last
    layer starts at zero, so a fresh net returns 0. Odd sides are rounded up (the edge is repeated) and the way up crops.
    `config` holds the arguments: `NCSNpp(**net.config)` rebuilds it.

    Against the published networks: the parameters are theirs in shape and number (`nets.presets` pins the counts). The noise level
    is embedded by `fourier` or `gaussian` of c_noise, fixed functions that count as no parameters; the published NCSN++ adds
    `channels` drawn frequencies that it does not train. There are no tables of noise levels and no division by sigma: both are the
    parameterization's. Published branches end in a layer of zeros, with which a fresh net halves its variance block by block.

    Args:
        shape: (C, H, W) of one image.
        channels: channels of the first level, an even number of at least 4; a multiple of 128 has the published 32 groups a norm.
        multipliers: one a level.
        blocks: residual blocks a level on the way down; one more on the way up.
        attention: the levels with self-attention: after each block going down, after the last going up. The middle always has one.
        dropout: probability within the blocks while training; the only part that draws from the global generator.
        fir: resample by the filter (1, 3, 3, 1) instead of means over 2 x 2 pixels and repeated pixels.
        pyramid: add the image to every level, halved and convolved step by step ("residual" progressive input).
        scale: 0: log-spaced features of c_noise; else the deviation of 2 channels frequencies, 16 in NCSN++: rough in time.
        classes: number of labels, 0 for an unconditional net.
        seed: the weights are a function of it; None draws fresh ones. No global generator is touched.

    Raises:
        TypeError, ValueError: an argument is not what is said above.

    Source: Song et al. 2021 (score SDE), appendices C and H; Brock et al. 2019 (BigGAN), appendix B.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (1,),
        dropout: float = 0.0,
        fir: bool = False,
        pyramid: bool = False,
        scale: float = 0.0,
        classes: int = 0,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.shape = check_image(shape)
        widths = check_levels(channels, multipliers, attention)
        levels = range(len(widths))
        check_even(channels, "channels")
        self.per_level = check_count(blocks, "blocks")
        check_number(dropout, "dropout", 0, 1)
        check_number(scale, "scale", 0)
        for name, value in (("fir", fir), ("pyramid", pyramid)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; wanted True or False: {name}=bool({name})")
        self.config: dict[str, Any] = {
            "shape": list(self.shape),
            "channels": channels,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "dropout": dropout,
            "fir": fir,
            "pyramid": pyramid,
            "scale": scale,
            "classes": classes,
            "seed": seed,
        }
        down, up = (filters.down, filters.up) if fir else (halve, double)
        block = partial(_Block, emb=4 * channels, dropout=dropout)
        with seeded(seed):
            self.condition = (
                Conditioning(2 * channels, 4 * channels, classes, partial(gaussian, scale=scale))
                if scale
                else Conditioning(channels, 4 * channels, classes, fourier)
            )
            self.enter = unit(nn.Conv2d(self.shape[0], channels, 3, padding=1))
            self.down, self.shrink, self.images = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
            width, image, skips = channels, self.shape[0], [channels]
            for level in levels:
                for _ in range(blocks):
                    self.down.append(block(width, widths[level], attention=level in attention))
                    width = widths[level]
                    skips.append(width)
                if level != levels[-1]:
                    self.shrink.append(block(width, width, resample=down))
                    if pyramid:
                        self.images.append(_Image(image, width, fir))
                        image = width
                    skips.append(width)
            self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])
            self.up, self.grow = nn.ModuleList(), nn.ModuleList()
            for level in reversed(levels):
                for i in range(blocks + 1):
                    self.up.append(block(width + skips.pop(), widths[level], attention=level in attention and i == blocks))
                    width = widths[level]
                if level:
                    self.grow.append(block(width, width, resample=up))
            self.norm = _norm(width)
            self.leave = zeroed(nn.Conv2d(width, self.shape[0], 3, padding=1))
        self.to(torch.get_default_device())

    def _run(self, x: Tensor, e: Tensor) -> Tensor:
        image = x.contiguous()  # a channels-last image would make every activation so: see UNet
        h = self.enter(image)
        skips = [h]
        for i, block in enumerate(self.down):
            level, later = divmod(i, self.per_level)
            if level and not later:
                h = self.shrink[level - 1](h, e)
                if self.images:
                    h = image = (self.images[level - 1](image) + h) * HALF
                skips.append(h)
            h = block(h, e)
            skips.append(h)
        for block in self.middle:
            h = block(h, e)
        for i, block in enumerate(self.up):
            level, later = divmod(i, self.per_level + 1)
            if level and not later:
                h = crop(self.grow[level - 1](h, e), skips[-1])
            h = block(torch.cat([h, skips.pop()], dim=1), e)
        return self.leave(silu(self.norm(h)))


class _Block(nn.Module):
    def __init__(
        self, fan_in: int, width: int, emb: int, dropout: float, resample: Resample | None = None, attention: bool = False
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = _norm(fan_in)
        self.conv1 = unit(nn.Conv2d(fan_in, width, 3, padding=1), SILU_SQUARE)
        self.shift = nn.Linear(emb, width)
        self.norm2 = _norm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = unit(nn.Conv2d(width, width, 3, padding=1), SILU_SQUARE)
        # A 1 x 1 convolution after a change of size even where the width stays: the published blocks have it.
        self.skip = nn.Identity() if fan_in == width and resample is None else unit(nn.Conv2d(fan_in, width, 1))
        self.attention = Attention(width, _norm) if attention else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = silu(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h) + self.shift(e)[:, :, None, None]
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return self.attention((self.skip(x) + h) * HALF)


class _Image(nn.Module):
    """One step of the progressive input: filtered, then a convolution of stride 2."""

    def __init__(self, fan_in: int, width: int, fir: bool) -> None:
        super().__init__()
        self.blur = filters.blur if fir else _border
        self.conv = unit(nn.Conv2d(fan_in, width, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.blur(x))


def _border(x: Tensor) -> Tensor:
    """One pixel of zeros below and to the right of the even size."""
    return pad(x, (0, 1 + x.shape[3] % 2, 0, 1 + x.shape[2] % 2))


def _norm(width: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 channels, as published."""
    most = max(1, min(width // 4, 32))
    return nn.GroupNorm(max(g for g in range(1, most + 1) if width % g == 0), width, eps=1e-6)
