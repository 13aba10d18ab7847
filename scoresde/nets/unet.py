"""A small U-Net for images of any size and number of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from scoresde.checks import check_count, check_number
from scoresde.nets.blocks import HALF, Attention, check_image, check_levels, crop, double, halve, norm, zeroed
from scoresde.nets.embed import Conditioning, Net, seeded

__all__ = ["UNet"]


class UNet(Net):
    """U-Net in the manner of DDPM++: residual blocks, a skip for each block going down, one mean-pooling a level.

    Level l has channels * multipliers[l] channels at 1 / 2^l of the size, rounded up: a pool over an odd side averages
    what is there (as if the edge were repeated) and the way up crops, so every size works. The last layer of every
    branch and of the net starts at zero, so a fresh net returns 0. `config` holds the arguments: `UNet(**net.config)`
    rebuilds it.

    On a CPU `net.to(memory_format=torch.channels_last)` takes a quarter off a call and a tenth off a training step.
    torch then lacks the rules for vmap, jvp and batched gradients, and safetensors refuses the weights:
    `net.to(memory_format=torch.contiguous_format)` brings them back.

    Args:
        shape: (C, H, W) of one image.
        channels: channels of the first level, at least 4; a multiple of 8 is fastest.
        multipliers: one a level.
        blocks: residual blocks a level and direction.
        attention: the levels (indices of `multipliers`) with self-attention after each block.
        dropout: probability within the blocks while training; the only part that draws from the global generator.
        classes: number of labels, 0 for an unconditional net.
        seed: the weights are a function of it; None draws fresh ones. No global generator is touched.

    Raises:
        TypeError, ValueError: an argument is not what is said above.

    Source: Ho et al. 2020, appendix B; Song et al. 2021 (score SDE), appendix H.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        classes: int = 0,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.shape = check_image(shape)
        widths = check_levels(channels, multipliers, attention)
        levels = range(len(widths))
        self.per_level = check_count(blocks, "blocks")
        check_number(dropout, "dropout", 0, 1)
        self.config: dict[str, Any] = {
            "shape": list(self.shape),
            "channels": channels,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "dropout": dropout,
            "classes": classes,
            "seed": seed,
        }

        def block(fan_in: int, level: int) -> _Block:
            return _Block(fan_in, widths[level], 4 * channels, dropout, level in attention)

        with seeded(seed):
            self.condition = Conditioning(2 * channels, 4 * channels, classes)
            self.enter = nn.Conv2d(self.shape[0], widths[0], 3, padding=1)
            self.down, self.narrow, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
            width = widths[0]
            for level in levels:
                for _ in range(blocks):
                    self.down.append(block(width, level))
                    width = widths[level]
            self.middle = block(width, levels[-1])
            for level in reversed(levels):
                # Narrowed before it grows: the first convolution of the finer level, the dearest one, sees fewer channels.
                self.narrow.append(nn.Conv2d(width, widths[level], 1) if width != widths[level] else nn.Identity())
                width = widths[level]
                self.up.extend(block(2 * width, level) for _ in range(blocks))
            self.norm = norm(width)
            self.leave = zeroed(nn.Conv2d(width, self.shape[0], 3, padding=1))
        self.to(torch.get_default_device())

    def _run(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.enter(x.contiguous())  # a channels-last image would make every activation so: see the class
        skips = []
        for i, block in enumerate(self.down):
            if i and i % self.per_level == 0:
                h = halve(h)
            h = block(h, e)
            skips.append(h)
        h = self.middle(h, e)
        for i, block in enumerate(self.up):
            skip = skips.pop()
            level, later = divmod(i, self.per_level)
            if not later:
                h = self.narrow[level](h)
                if level:
                    h = crop(double(h), skip)
            h = block(torch.cat([h, skip], dim=1), e)
        return self.leave(silu(self.norm(h)))


class _Block(nn.Module):
    def __init__(self, fan_in: int, width: int, emb: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.norm1 = norm(fan_in)
        self.conv1 = nn.Conv2d(fan_in, width, 3, padding=1)
        self.film = nn.Linear(emb, 2 * width)
        self.norm2 = norm(width, affine=False)  # film has the scale and the shift
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(width, width, 3, padding=1))
        self.skip = nn.Conv2d(fan_in, width, 1) if fan_in != width else nn.Identity()
        self.attention = Attention(width) if attention else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = self.film(e)[:, :, None, None].chunk(2, dim=1)
        h = silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        h = self.conv2(self.dropout(h))
        return self.attention((self.skip(x) + h) * HALF)
