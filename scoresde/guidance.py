"""Wrappers of a denoiser that change x0. Off by default: a changed x0 is another flow, with another law, latent and likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_number
from .denoiser import Denoiser, check_denoiser

__all__ = ["Clipped", "Thresholded"]


class _Around(Denoiser):
    """A wrapper of `denoiser`, whose tolerance and error norm it keeps."""

    denoiser: Denoiser

    def tolerance(self, size: Tensor, t: Tensor, rtol: float, atol: float) -> Tensor:
        """The wrapped denoiser's."""
        return self.denoiser.tolerance(size, t, rtol, atol)

    def error_norm(self, ratio: Tensor) -> Tensor:
        """The wrapped denoiser's."""
        return self.denoiser.error_norm(ratio)


class Clipped(_Around):
    """x0 clamped to [low, high], the range of the data: static thresholding. Ho et al. 2020 (NeurIPS), section 3.2 as released.

    It moves the mean of a noisy state, so it biases a law that touches the bounds; a `log_prob` is that of the clipped flow.
    """

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(check_denoiser(denoiser).sde)
        self.denoiser = denoiser
        self.low, self.high = check_number(low, "low"), check_number(high, "high", low, open_low=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 of the wrapped denoiser, in [low, high]."""
        return self.denoiser(x, t).clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """Its bounds."""
        return f"low={self.low}, high={self.high}"

    def select(self, index: Any) -> Clipped:
        """These rows."""
        return Clipped(self.denoiser.select(index), self.low, self.high)


class Thresholded(_Around):
    """x0 clamped to [-s, s] and scaled by bound / s: dynamic thresholding. Saharia et al. 2022 (Imagen, NeurIPS), section 2.3.

    s is the larger of `bound` and the `quantile` of |x0| over the entries of the sample itself. For guided images in [-bound, bound].
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995, bound: float = 1.0) -> None:
        super().__init__(check_denoiser(denoiser).sde)
        self.denoiser = denoiser
        self.quantile = check_number(quantile, "quantile", 0.0, 1.0, open_low=True)
        self.bound = check_number(bound, "bound", 0.0, open_low=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x0 of the wrapped denoiser, within the bound."""
        x0 = self.denoiser(x, t)
        if not x0.numel():
            return x0
        # by sorting: torch.quantile refuses more than 16 million entries
        sizes = x0.abs().flatten(1).sort(dim=1).values
        place = self.quantile * (sizes.shape[1] - 1)
        below = int(place)
        s = torch.lerp(sizes[:, below], sizes[:, min(below + 1, sizes.shape[1] - 1)], place - below)
        s = s.clamp(min=self.bound).reshape(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, s), -s) * (self.bound / s)

    def extra_repr(self) -> str:
        """Its settings."""
        return f"quantile={self.quantile}, bound={self.bound}"

    def select(self, index: Any) -> Thresholded:
        """These rows."""
        return Thresholded(self.denoiser.select(index), self.quantile, self.bound)
