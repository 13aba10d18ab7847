"""What every module refuses, and in which words: what came, what was wanted, the mend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

__all__ = ["NonFiniteError", "Status", "UnfinishedError"]

STATE_DTYPES = (torch.float32, torch.float64)


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity appeared: says which samples, at which step and time, and in what."""


class UnfinishedError(RuntimeError):
    """A solve stopped before its end, at a bound on its work or on its step size: says which samples, where, and the mend."""


class Status(IntEnum):
    """What became of a sample, where it is not finite: its status is then negative; k > 0 is the first step that left it non-finite."""

    DONE = 0
    MAX_NFE = -1  # it had used its evaluations
    MIN_STEP = -2  # the error stayed too large down to the smallest step that time resolves


def shape_of(x: Any) -> str:
    """Name a value as an error message wants it: shape and dtype of a tensor, the type of anything else."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" if isinstance(x, Tensor) else type(x).__name__


def check_state(x: Any, name: str = "x") -> Tensor:
    """Return `x` when it is a float32 or float64 tensor `[B, *shape]` with an event dimension; raise otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {shape_of(x)}; wanted a tensor [B, *shape]: torch.as_tensor(...) makes one")
    if x.dtype not in STATE_DTYPES:
        raise TypeError(
            f"{name} is {shape_of(x)}; the state is float32 or float64: {name}.float(). "
            "A network may run in float16 or bfloat16 (net.half()); the state around it does not"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} is {shape_of(x)}; wanted [B, *shape] with at least one event dimension: {name}[:, None]")
    return x


def check_finite(x: Tensor, name: str = "x") -> Tensor:
    """Return `x` when every entry is finite; raise a ValueError that names the first bad rows otherwise."""
    if not math.isfinite(float(x.detach().sum())) and not bool(torch.isfinite(x).all()):  # a sum is quicker, and may overflow
        rows = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist() if x.ndim > 1 else []
        raise ValueError(f"{name} has NaN or infinite entries in rows {rows[:8]}; wanted finite numbers: clean the data first")
    return x


def check_time(t: Any, x: Tensor, name: str = "t") -> Tensor:
    """Return `t` when it is a float tensor of shape () or [B, 1, ..., 1] for `x`; raise otherwise."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {shape_of(t)}; wanted a tensor: torch.tensor({name}, dtype=torch.float64)")
    if not t.is_floating_point():
        raise TypeError(f"{name} is {shape_of(t)}; times are continuous: {name}.double()")
    if t.ndim and t.shape != (len(x),) + (1,) * (x.ndim - 1):
        wanted = [len(x)] + [1] * (x.ndim - 1)
        raise ValueError(f"{name} is {shape_of(t)}; wanted () or {wanted} for x {list(x.shape)}: {name}.reshape({wanted})")
    return t


def check_number(value: Any, name: str, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """Return `value` as a float when it is a finite real number in [low, high] (or (low, high]); raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {shape_of(value)}; wanted a number: float({name})")
    if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
        bound = f"{'(' if open_low or low == -math.inf else '['}{low:.12g}, {high:.12g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name} is {value}; wanted a finite number in {bound}")
    return float(value)


def check_count(value: Any, name: str, low: int = 1) -> int:
    """Return `value` when it is an integer of at least `low`; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); wanted an integer: int({name})")
    if value < low:
        raise ValueError(f"{name} is {value}; wanted an integer of at least {low}")
    return value


def check_even(value: Any, name: str) -> int:
    """Return `value` when it is an even number of features, at least 2; raise otherwise."""
    if check_count(value, name, 2) % 2:
        raise ValueError(f"{name} is {value}; wanted an even number, a sine and a cosine each: {name}={value + 1}")
    return value


def check_callable(value: Any, name: str, wanted: str) -> Any:
    """Return `value` when it can be called; raise a TypeError that says what it should compute otherwise."""
    if not callable(value):
        raise TypeError(f"{name} is {shape_of(value)}; wanted {wanted}")
    return value


def check_rows(values: Sequence[Any] | Tensor, rows: int, name: str) -> None:
    """Raise unless there is one entry of `values` a row of the batch."""
    if len(values) != rows:
        raise ValueError(f"{name} has {len(values)} entries for {rows} rows; wanted one a row, as in {name}=range({rows})")
