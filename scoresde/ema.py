"""Averages of the weights over training, several at once, and averages of any length made afterwards from stored ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .checks import check_count, check_number, shape_of
from .pieces import local

__all__ = ["EMA", "PowerEMA", "exponent", "posthoc", "posthoc_coefficients"]


class EMA:
    """Exponential moving average of a module's parameters and buffers, through torch's AveragedModel; `.module` is the average.

    The decay warms up, min(decay, n / (9 + n)) at update n = 2, 3, ..., so that early averages forget the initialisation; the first
    update copies.
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

    @property
    def name(self) -> str:
        """Of its file: ema_0.999."""
        return f"ema_{self.decay:.12g}"

    @property
    def updates(self) -> int:
        """How many steps it has taken in."""
        return int(self._average.n_averaged)

    @updates.setter
    def updates(self, n: int) -> None:
        self._average.n_averaged.fill_(check_count(n, "updates", 0))

    def update(self, module: nn.Module) -> None:
        """Take one step of `module` into the average."""
        self._average.update_parameters(module)

    def _kept(self, n: float) -> float:
        """The factor on the old average when n steps are in it."""
        return min(self.decay, (1 + n) / (10 + n))

    def _mix(self, averages: Any, currents: Any, n: Any) -> None:
        averages, currents = [local(a) for a in averages], [local(c) for c in currents]  # of what is sharded, each its own
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(currents), 1 - self._kept(float(n)))
        else:  # counters, such as a batch norm's: they come a group a dtype
            torch._foreach_copy_(list(averages), list(currents))


class PowerEMA(EMA):
    """Power-function average: after t updates, update tau weighs as tau^gamma; a <- b a + (1 - b) x, b = (1 - 1 / t)^(gamma + 1).

    std: the width of that profile as a share of the training so far, in (0, 0.288]; EDM2's best are 0.05 .. 0.15. It grows with the
    training, has no warm-up to choose, and `posthoc` makes an average of any other std from stored ones of two.
    Karras et al. 2024 (CVPR), eqs. 3, 4, appendix C.
    """

    def __init__(self, module: nn.Module, std: float = 0.1) -> None:
        self.std, self.gamma = std, exponent(std)
        super().__init__(module, 1.0)

    @property
    def name(self) -> str:
        """Of its file: ema_std0.1."""
        return f"ema_std{self.std:.12g}"

    def _kept(self, n: float) -> float:
        return (n / (n + 1)) ** (self.gamma + 1)


def exponent(std: float) -> float:
    """Gamma of the profile tau^gamma on [0, t] whose standard deviation is std t: std^2 = (gamma + 1) / (gamma + 2)^2 / (gamma + 3).

    std in (0, 1 / sqrt(12)]; at its end gamma = 0, the plain mean. Karras et al. 2024 (CVPR), eq. 126.
    """
    check_number(std, "std", 0.0, open_low=True)
    if std > (1 + 1e-9) / math.sqrt(12):
        raise ValueError(f"std is {std}; wanted at most 1 / sqrt(12) = 0.2887, that of the plain mean of all steps")
    low, high = 0.0, 2 / std  # the right-hand side falls, as 1 / gamma^2
    for _ in range(200):
        gamma = (low + high) / 2
        if (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > std**2:
            low = gamma
        else:
            high = gamma
    return (low + high) / 2


def _inner(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """int p_a p_b of p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]."""
    ratio = torch.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * torch.maximum(t_a, t_b))


def posthoc_coefficients(stored: Sequence[tuple[int, float]], step: int, std: float) -> list[float]:
    """c of the average sum_i c_i a_i nearest in L2 to the power average of `std` at `step`; they add to one.

    stored: (step, std) of each stored average. Karras et al. 2024 (CVPR), appendix C.2, with the constraint on the sum.
    """
    if not stored:
        raise ValueError("stored is empty; wanted (step, std) of at least one stored average")
    steps = [float(check_count(s, f"stored[{i}][0]")) for i, (s, _) in enumerate(stored)]
    if max(steps) > check_count(step, "step"):
        steps_after = sorted(int(s) for s in steps if s > step)
        raise ValueError(
            f"stored has averages of steps {steps_after}, after step {step}; wanted earlier ones alone: leave them out"
        )
    t = torch.tensor(steps, dtype=torch.float64)
    gamma = torch.tensor([exponent(s) for _, s in stored], dtype=torch.float64)
    target = torch.tensor(float(step), dtype=torch.float64), torch.tensor(exponent(std), dtype=torch.float64)
    # Rows scaled by the step: the entries are of order one however long the training was.
    matrix, right = step * _inner(t[:, None], gamma[:, None], t, gamma), step * _inner(t, gamma, *target)
    n = len(stored)
    bordered = torch.ones(n + 1, n + 1, dtype=torch.float64)
    bordered[:n, :n], bordered[n, n] = matrix, 0.0
    # Least squares: averages of neighbouring steps make it nearly singular, and the smallest coefficients are the ones wanted.
    found = torch.linalg.lstsq(bordered, torch.cat([right, torch.ones(1, dtype=torch.float64)])[:, None], driver="gelsd").solution
    return found[:n, 0].tolist()


def posthoc(stored: Sequence[tuple[int, float, Mapping[str, Tensor]]], std: float, step: int | None = None) -> dict[str, Tensor]:
    """The weights of a power average of any std, from stored ones: (step, std, tensors) each; at the last step by default.

    Two PowerEMA (std 0.05 and 0.1) stored at some ten steps or more reconstruct std in between and beyond to a part in thousands of what
    averaging changes; `posthoc_coefficients` says how. Integer tensors are those of the latest.
    """
    step = max(s for s, _, _ in stored) if step is None and stored else step
    coefficients = posthoc_coefficients([(s, w) for s, w, _ in stored], step, std)  # type: ignore[bad-argument-type]
    latest = max(stored, key=lambda entry: entry[0])[2]
    if strange := [s for s, _, tensors in stored if tensors.keys() != latest.keys()]:
        raise ValueError(f"the averages of steps {strange} have other tensors than the latest; wanted those of one training")

    def mixed(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return like.clone()
        return sum(c * tensors[name].double() for c, (_, _, tensors) in zip(coefficients, stored, strict=True)).to(like.dtype)  # type: ignore[union-attr]

    return {name: mixed(name, like) for name, like in latest.items()}
