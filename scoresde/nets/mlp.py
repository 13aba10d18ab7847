"""A residual multilayer perceptron for points and small vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from scoresde.checks import check_count, check_even
from scoresde.nets.embed import Conditioning, Net, check_shape, seeded

__all__ = ["MLP"]


class MLP(Net):
    """Residual perceptron on the flattened sample: h <- h + W2 silu(W1 (LN(h) (1 + scale(e)) + shift(e))).

    The last layer starts at zero, so a fresh net returns 0. `config` holds the arguments: `MLP(**net.config)` rebuilds it.

    Args:
        shape: the shape of one sample, a sequence of integers or one integer.
        width: length of the hidden vectors and of the embedding e.
        depth: number of residual blocks.
        classes: number of labels, 0 for an unconditional net.
        emb: even number of Fourier features of the noise level.
        seed: the weights are a function of it; None draws fresh ones. No global generator is touched.

    Raises:
        TypeError, ValueError: an argument is not what is said above.

    Source: He et al. 2016 (residual blocks), Perez et al. 2018, eq. 2 (scale and shift).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        width: int = 256,
        depth: int = 3,
        classes: int = 0,
        emb: int = 64,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.shape = check_shape(shape)
        check_count(width, "width")
        check_count(depth, "depth")
        check_even(emb, "emb")
        self.config: dict[str, Any] = {
            "shape": list(self.shape),
            "width": width,
            "depth": depth,
            "classes": classes,
            "emb": emb,
            "seed": seed,
        }
        size = math.prod(self.shape)
        with seeded(seed):
            self.condition = Conditioning(emb, width, classes)
            self.enter = nn.Linear(size, width)
            self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
            self.leave = nn.Linear(width, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.to(torch.get_default_device())

    def _run(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.enter(x.flatten(1))
        for block in self.blocks:
            h = block(h, e)
        return self.leave(silu(h)).reshape(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.film = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # film has the scale and the shift
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.film(e).chunk(2, dim=1)
        return h + self.second(silu(self.first(torch.addcmul(shift, self.norm(h), 1 + scale))))
