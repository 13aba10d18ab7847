"""What every metric refuses, and the one conversion of what it takes: to float64 on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Array", "samples", "tensor"]

Array = Tensor | np.ndarray


def tensor(value: Any, name: str, ndim: int) -> Tensor:
    """Return a real, finite tensor or array of `ndim` dimensions as float64 on the CPU; raise otherwise."""
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{name} is {type(value).__name__}; wanted a tensor or an array: torch.as_tensor({name})")
    x = torch.as_tensor(value).detach()
    if x.is_complex():
        raise TypeError(f"{name} is {x.dtype}; wanted real numbers: torch.view_as_real({name}).flatten(1)")
    if x.ndim != ndim:
        wanted = {1: "[D]: a vector", 2: "[N, D]: rows are samples, x.flatten(1) makes them"}[ndim]
        raise ValueError(f"{name} has shape {list(x.shape)}; wanted {wanted}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} has NaN or infinite entries; wanted finite numbers: find the bad samples first")
    return x.to("cpu", torch.float64)


def samples(value: Any, name: str, least: int = 2) -> Tensor:
    """Return samples [N, D] as `tensor` does, with N >= least and D >= 1; raise otherwise."""
    x = tensor(value, name, 2)
    if len(x) < least or not x.shape[1]:
        raise ValueError(f"{name} has shape {list(x.shape)}; wanted [N, D] with N >= {least} and D >= 1: give more samples")
    return x
