"""The bits of seeded noise: Philox4x32-10 words, and normals made of them.

It is made of integer operations and of the float64 ones that IEEE 754 rounds exactly (+ - * / sqrt), one torch call each, so that no
library's log or cos and no fused multiply-add enters: any CPU, vector width, thread count, chunk and GPU gives the same bits. They are
settled for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["normals", "philox", "unit"]

CHUNK = 2**15  # Philox blocks at a time on a CPU, 131072 draws: few calls, and buffers that stay in cache (measured)


def _constants(dtype: torch.dtype, *values: float) -> tuple[Tensor, ...]:
    """0-dim CPU tensors: such an operand is a scalar on any device, and its call costs half of a Python number's."""
    return torch.tensor(values, dtype=dtype, device="cpu").unbind()


WORD, SIGN, ANGLE, ROOT_HALF = _constants(torch.int64, 2**32 - 1, -(2**63), 2**30 - 1, 0x3FE6A09E667F3BCD)
S32, S33, S52, S63, M0, M1 = _constants(torch.int64, 32, 33, 52, 63, 0xD2511F53, 0xCD9E8D57)
WEYL = torch.tensor([[r * 0x9E3779B9, r * 0xBB67AE85] for r in range(10)], device="cpu")[:, :, None, None]
ONE, HALF, UNIT, CENTRE, TURN = _constants(torch.float64, 1, 0.5, 2.0**-32, 2**29 - 0.5, math.pi * 2.0**-31)
LOG = _constants(torch.float64, *(-4 / k for k in range(21, 0, -2)), -2 * 0.6931471805599453)  # of atanh, and log 2
SIN = _constants(torch.float64, *((-1) ** (k // 2) / math.factorial(k) for k in range(17, 0, -2)))


def _rounds(keys: Tensor, index: Tensor, stream: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of (block, index low, index high, stream): words (0, 2) and words (1, 3), each `[2, B, blocks]`."""
    rows, columns = len(index), len(blocks)
    if rows > columns:  # the longer dimension is the inner one in memory: the keys broadcast along the other
        a, b, p = index.new_empty(3, 2, columns, rows).transpose(2, 3)
    else:
        a, b, p = index.new_empty(3, 2, rows, columns)
    (a0, a1), (b0, b1), (p0, p1) = a, b, p
    a0.copy_(blocks)
    a1.copy_((index >> S32)[:, None]).bitwise_and_(WORD)
    b0.copy_(index[:, None])
    b1.fill_(stream)
    for key in keys:
        torch.mul(a0, M0, out=p1)  # wraps modulo 2^64
        torch.mul(a1, M1, out=p0)
        torch.bitwise_right_shift(p, S32, out=a)
        a.bitwise_xor_(b).bitwise_xor_(key).bitwise_and_(WORD)  # b and key are right in their low 32 bits alone
        b, p, p0, p1, b0, b1 = p, b, b0, b1, p0, p1
    return a, b.bitwise_and_(WORD)


def _chunks(key: Tensor, index: Tensor | int, stream: int, n: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield (rows, blocks, words (0, 2), words (1, 3)) until every row has n words, a chunk at a time."""
    index = index if isinstance(index, Tensor) else torch.full_like(key, index)
    keys = torch.stack((key & WORD, key >> S32))[:, :, None] + WEYL.to(key.device)
    total, size = -(-n // 4), CHUNK if key.device.type == "cpu" else 2**22
    tall = max(1, size // max(total, 1))
    for rows in (slice(i, i + tall) for i in range(0, len(key), tall)):
        for columns in (slice(i, min(i + size, total)) for i in range(0, total, size)):
            blocks = torch.arange(columns.start, columns.stop, device=key.device)
            yield rows, columns, *_rounds(keys[:, :, rows], index[rows], stream, blocks)


def philox(key: Tensor, index: Tensor | int, stream: int, n: int) -> Tensor:
    """The first n 32-bit words of each row's (seed, stream, index), as int64 `[B, n]`, on the device of key.

    key holds the seeds, int64 `[B]`; index the draw or the tree's node, int64 `[B]` or an int. Word j is word j % 4 of
    Philox4x32-10 at the counter (j // 4, index low, index high, stream), whatever n (Salmon, Moraes, Dror and Shaw, 2011).
    """
    words = key.new_empty(len(key), -(-n // 4), 2, 2)
    for rows, columns, a, b in _chunks(key, index, stream, n):
        words[rows, columns, :, 0], words[rows, columns, :, 1] = a.permute(1, 2, 0), b.permute(1, 2, 0)
    return words.flatten(1)[:, :n]


def unit(words: Tensor) -> Tensor:
    """(w + 1/2) / 2^32, uniform in (0, 1), exact in float64."""
    return words.double().add_(HALF).mul_(UNIT)


def _minus_two_log(u: Tensor) -> Tensor:
    """-2 log u for normal float64 u: u = m 2^e with m in [sqrt(1/2), sqrt 2), and log m = 2 atanh((m - 1) / (m + 1))."""
    bits = u.view(torch.int64)
    e = (bits - ROOT_HALF).bitwise_right_shift_(S52)
    m = (bits - e.bitwise_left_shift(S52)).view(torch.float64)
    ratio = (m - ONE).div_(m.add_(ONE))
    square = ratio * ratio
    first, *rest, last, log_2 = LOG  # |ratio| < 0.172: the first term left out is below 2^-60
    series = square * first
    for coefficient in rest:
        series.add_(coefficient).mul_(square)
    return series.add_(last).mul_(ratio).add_(e.double().mul_(log_2))


def _cos_sin(words: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the circle: 30 bits are an angle in (-pi/4, pi/4), bit 30 exchanges cos and sin, bit 31 negates both."""
    angle = (words & ANGLE).double().sub_(CENTRE).mul_(TURN)
    square = angle * angle
    first, *rest, last = SIN
    sin = square * first
    for coefficient in rest:
        sin.add_(coefficient).mul_(square)
    sin.add_(last).mul_(angle)
    cos = (ONE - sin * sin).sqrt_()  # sin^2 <= 1/2: nothing cancels
    c, s = cos.view(torch.int64), sin.view(torch.int64)
    flip = (c ^ s).bitwise_and_((words << S33).bitwise_right_shift_(S63)).bitwise_xor_((words << S32).bitwise_and_(SIGN))
    c.bitwise_xor_(flip)
    s.bitwise_xor_(flip)
    return cos, sin


def normals(key: Tensor, index: Tensor | int, stream: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals `[B, n]` from words (0, 1) and (2, 3) of each block, in float64, then cast (Box and Muller, 1958)."""
    z = torch.empty(len(key), -(-n // 4), 2, 2, dtype=dtype, device=key.device)
    for rows, columns, a, b in _chunks(key, index, stream, n):
        radius, (cos, sin) = _minus_two_log(unit(a)).sqrt_(), _cos_sin(b)
        z[rows, columns, :, 0], z[rows, columns, :, 1] = cos.mul_(radius).permute(1, 2, 0), sin.mul_(radius).permute(1, 2, 0)
    return z.flatten(1)[:, :n]
