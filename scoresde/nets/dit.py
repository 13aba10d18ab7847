"""A diffusion transformer for images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, softmax

from scoresde.checks import check_count, check_even
from scoresde.nets.blocks import check_image, unit, zeroed
from scoresde.nets.embed import Conditioning, Net, seeded

__all__ = ["DiT"]


class DiT(Net):
    """Transformer on patches, each branch with its scale, shift and gate from the noise level and label (adaLN-Zero).

        h <- h + gate1(e) attend(LN(h) (1 + scale1(e)) + shift1(e))
        h <- h + gate2(e) W2 gelu(W1 (LN(h) (1 + scale2(e)) + shift2(e)))

    Gates, shifts, scales and the last layer start at zero: a fresh block is the identity and a fresh net returns 0. Queries and keys
    have mean square 1 a head, times a learned gain, so that the attention stays bounded in low precision. Positions are fixed sines
    and cosines of row and column. `config` holds the arguments: `DiT(**net.config)` rebuilds it.

    Args:
        shape: (C, H, W) of one image.
        width: length of a token, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: heads of attention.
        patch: side of a patch; it divides H and W.
        classes: number of labels, 0 for an unconditional net.
        emb: even number of Fourier features of the noise level.
        seed: the weights are a function of it; None draws fresh ones. No global generator is touched.

    Raises:
        TypeError, ValueError: an argument is not what is said above.

    Source: Peebles & Xie 2023 (ICCV), section 3; Dehghani et al. 2023 (ViT-22B), section 2, for the norm of queries and keys,
    here a root mean square (Zhang & Sennrich 2019, eq. 4).
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        patch: int = 2,
        classes: int = 0,
        emb: int = 64,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.shape = check_image(shape)
        check_count(depth, "depth")
        self.patch = check_count(patch, "patch")
        if check_count(width, "width", 4) % math.lcm(4, check_count(heads, "heads")):
            unit_of = math.lcm(4, heads)
            raise ValueError(
                f"width is {width} with {heads} heads; wanted a multiple of 4, for the positions, and of heads: "
                f"width={unit_of * math.ceil(width / unit_of)}"
            )
        channels, rows, columns = self.shape
        if rows % patch or columns % patch:
            fits = [p for p in range(1, min(rows, columns) + 1) if rows % p == columns % p == 0]
            raise ValueError(f"patch is {patch} for images of {rows} x {columns}; wanted a divisor of both sides, one of {fits}")
        check_even(emb, "emb")
        self.config: dict[str, Any] = {
            "shape": list(self.shape),
            "width": width,
            "depth": depth,
            "heads": heads,
            "patch": patch,
            "classes": classes,
            "emb": emb,
            "seed": seed,
        }
        with seeded(seed):
            self.condition = Conditioning(emb, width, classes)
            self.enter = unit(nn.Linear(channels * patch**2, width))
            # Not in the state_dict: the arguments say what it is.
            self.register_buffer("positions", _positions(rows // patch, columns // patch, width).float(), persistent=False)
            self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
            self.film = zeroed(nn.Linear(width, 2 * width))
            self.leave = zeroed(nn.Linear(width, channels * patch**2))
        self.to(torch.get_default_device())

    def _run(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.enter(_patches(x, self.patch))
        h = h + self.positions.to(h.dtype)  # type: ignore[operator]
        for block in self.blocks:
            h = block(h, e)
        shift, scale = self.film(e)[:, None].chunk(2, dim=2)
        return _image(self.leave(_modulated(h, shift, scale)), self.shape, self.patch)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.film = zeroed(nn.Linear(width, 6 * width))
        self.qkv = unit(nn.Linear(width, 3 * width))
        self.gain = nn.Parameter(torch.ones(2, width // heads))  # of the queries and of the keys
        self.out = unit(nn.Linear(width, width))
        self.first = unit(nn.Linear(width, 4 * width))
        self.second = unit(nn.Linear(4 * width, width))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.film(e)[:, None].chunk(6, dim=2)
        h = h + gate1 * self.out(self._attend(_modulated(h, shift1, scale1)))
        z = gelu(self.first(_modulated(h, shift2, scale2)), approximate="tanh")
        return h + gate2 * self.second(z)

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, width / heads] each
        q, k = _unit_square(q, self.gain[0]), _unit_square(k, self.gain[1])
        # Written out, as in blocks.Attention: scaled_dot_product_attention has no forward-mode derivative.
        weight = softmax((q * q.shape[3] ** -0.5) @ k.mT, dim=-1)
        return (weight @ v).transpose(1, 2).flatten(2)


def _unit_square(x: Tensor, gain: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares overflow float16
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain).to(x.dtype)


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


def _patches(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C patch^2], the patches row by row."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, rows, patch, columns, patch]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _image(h: Tensor, shape: Sequence[int], patch: int) -> Tensor:
    """The inverse of `_patches`."""
    channels, rows, columns = shape
    h = h.unflatten(2, (channels, patch, patch)).unflatten(1, (rows // patch, columns // patch))
    return h.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows, columns)


def _positions(rows: int, columns: int, width: int) -> Tensor:
    """[rows columns, width] float64: sin and cos of omega row and of omega column, omega = 10000^(-4k / width)."""
    omega = 10000.0 ** (-4 * torch.arange(width // 4, dtype=torch.float64) / width)
    row, column = torch.meshgrid(torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij")
    angles = [n.reshape(-1, 1) * omega for n in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
