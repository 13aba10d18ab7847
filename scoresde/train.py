"""Training as a generator: the caller loops, logs, plots and stops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .checks import NonFiniteError, check_callable, check_finite, check_number, check_state, shape_of
from .denoiser import Denoiser, Preconditioned, check_denoiser
from .loss import Times, Weight, dsm_loss, edm, log_normal, stratified
from .noise import entropy_seeds

__all__ = ["EMA", "Step", "fit"]


class EMA:
    """Exponential moving average of a module's parameters and buffers, through torch's AveragedModel; `.module` is the average.

    The decay warms up, min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ..., so that early averages
    forget the initialisation; the first update copies.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module is {shape_of(module)}; wanted an nn.Module: the denoiser that is trained")
        self.decay = check_number(decay, "decay", 0.0, 1.0)
        self._average = AveragedModel(module, multi_avg_fn=self._mix, use_buffers=True).requires_grad_(False).eval()

    @property
    def module(self) -> Any:
        """The averaged copy."""
        return self._average.module

    def update(self, module: nn.Module) -> None:
        """Take one step of `module` into the average."""
        self._average.update_parameters(module)

    def _mix(self, averages: Any, currents: Any, n: Any) -> None:
        decay = min(self.decay, (1 + float(n)) / (10 + float(n)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(currents), 1 - decay)
        else:  # counters, such as a batch norm's: they come a group a dtype
            torch._foreach_copy_(list(averages), list(currents))


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 1, the mean weighted loss of the batch, the gradient's norm before clipping."""

    step: int
    loss: float
    grad_norm: float


def fit(
    denoiser: Denoiser, batches: Iterable[Any], *, weight: Weight = edm, times: Times | None = None,
    optimizer: torch.optim.Optimizer | None = None, ema: EMA | None = None, clip: float = 1.0, generator: torch.Generator | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Train by denoising score matching; yield a Step a batch, for as long as `batches` lasts.

    batches: tensors x0 `[B, *shape]`, or pairs (x0, cond) for a Preconditioned denoiser; weight, times: see `scoresde.loss` (default
    edm, and a stratified log-normal); optimizer: default AdamW(lr=1e-3) on the parameters; ema: updated after every step; clip: the
    largest gradient norm (inf: none); generator: of t and noise, on the CPU (default: fresh entropy). It is a generator: nothing
    happens until it is looped over, and the denoiser is left in train mode (the average of an EMA is in eval mode). Raises
    NonFiniteError before a step that would put NaN into the parameters, ValueError for NaN in data.
    """
    check_denoiser(denoiser)
    times = (
        stratified(log_normal) if times is None else check_callable(times, "times", "a function (sde, u) -> times of u in (0, 1)")
    )
    if isinstance(batches, torch.Tensor):
        raise TypeError(f"batches is a tensor {shape_of(batches)}; wanted an iterable of them: [x0], a DataLoader or a generator")
    if clip != math.inf:
        check_number(clip, "clip", 0.0, open_low=True)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3) if optimizer is None else optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is {optimizer!r}; wanted a torch.optim.Optimizer of denoiser.parameters(), as torch.optim.Adam makes"
        )
    if generator is None:
        generator = torch.Generator().manual_seed(entropy_seeds(1)[0])
    elif not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {shape_of(generator)}; wanted a torch.Generator: torch.Generator().manual_seed(0)")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    denoiser.train()
    for number, batch in enumerate(batches, 1):
        parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch, None)
        if len(parts) != 2:
            raise ValueError(
                f"batch {number} has {len(parts)} parts; wanted a tensor x0 or a pair (x0, cond): (b[0] for b in batches)"
            )
        x0, cond = parts
        check_finite(check_state(x0, "x0"), "x0")
        if cond is not None and not isinstance(denoiser, Preconditioned):
            raise TypeError(f"batches give labels and {type(denoiser).__name__} takes none; wanted Preconditioned, or x0 alone")
        model: Denoiser = denoiser.condition(cond) if isinstance(denoiser, Preconditioned) and cond is not None else denoiser
        u = torch.rand(len(x0), generator=generator, dtype=torch.float64, device=generator.device).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(x0.device)
        loss = dsm_loss(model, x0, times(model.sde, u), weight, noise).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        value, size = float(loss.detach()), float(norm)
        if not math.isfinite(value) or not math.isfinite(size):
            raise NonFiniteError(
                f"step {number}: loss {value:.4g}, gradient norm {size:.4g}; the parameters are as they were. Lower the "
                "learning rate, or check the network and the data"
            )
        optimizer.step()
        if ema is not None:
            ema.update(denoiser)
        yield Step(number, value, size)
