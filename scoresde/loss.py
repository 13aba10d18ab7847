"""Denoising score matching, once: the weighted error of x0. Weights and time distributions are functions; write your own likewise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_callable, check_number, check_state, check_time
from .denoiser import Denoiser, check_denoiser
from .linear import LinearSDE
from .noise import entropy_seeds, seeded

__all__ = ["capped", "dsm_loss", "edm", "likelihood", "log_normal", "simple", "stratified", "uniform"]

Weight = Callable[[LinearSDE, Tensor], Tensor]
Times = Callable[[LinearSDE, Tensor], Tensor]


def dsm_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
    """Denoising score matching: weight(t) |denoiser(alpha x0 + sigma noise, t) - x0|^2 / D, `[B]`. Vincent 2011; Song et al. 2021, eq. 7.

    x0 `[B, *shape]` clean data; t `[B]`, `[B, 1, ..., 1]` or (); weight: a function (sde, t) -> factor on the x0 error; noise: unit
    noise of the shape of x0 (None: fresh entropy). The minimum is E[x_0 | x_t] for any positive weight.
    """
    check_denoiser(denoiser)
    check_state(x0, "x0")
    check_callable(weight, "weight", "a function (sde, t) -> factor on the x0 error, as scoresde.loss.edm")
    if isinstance(t, Tensor) and t.ndim == 1 and len(t) == len(x0):
        t = t.reshape(-1, *[1] * (x0.ndim - 1))
    sde, slack = denoiser.sde, 4 * torch.finfo(check_time(t, x0).dtype).eps * denoiser.sde.t_max
    if t.device.type == "cpu" and t.numel() and not sde.t_min - slack <= float(t.min()) <= float(t.max()) <= sde.t_max + slack:
        raise ValueError(f"t spans [{t.min():.6g}, {t.max():.6g}]; wanted times of {sde!r}, in [{sde.t_min:g}, {sde.t_max:g}]")
    if noise is None:
        noise = seeded(entropy_seeds(len(x0))).initial(x0.shape, x0.dtype, x0.device)
    error = (denoiser.predict(sde.perturb(x0, t, noise), t).x0 - x0).square().flatten(1).mean(1)
    return torch.as_tensor(weight(sde, t.double())).to(error).flatten() * error


def simple(sde: LinearSDE, t: Tensor) -> Tensor:
    """SNR = alpha^2 / sigma^2: the plain error of eps. Ho et al. 2020 (NeurIPS), eq. 14."""
    return sde.logsnr(t).exp()


def capped(sde: LinearSDE, t: Tensor, cap: float = 5.0) -> Tensor:
    """min(SNR, cap). Hang et al. 2023 (ICCV), min-SNR-gamma; `functools.partial(capped, cap=1)` for another cap."""
    return sde.logsnr(t).exp().clamp(max=cap)


def edm(sde: LinearSDE, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(rho^2 + sd^2) / (rho sd)^2: unit loss of the EDM network at initialisation. Karras et al. 2022 (NeurIPS), table 1."""
    rho = sde.rho(t)
    return (rho**2 + sigma_data**2) / (rho * sigma_data) ** 2


def likelihood(sde: LinearSDE, t: Tensor) -> Tensor:
    """g^2 alpha^2 / sigma^4: g^2 |score error|^2 of the x0 error.

    With uniform t, (t_max - t_min) D / 2 times the loss bounds -log p up to a constant. Song et al. 2021 (NeurIPS), theorem 1.
    """
    return (sde.diffusion(t) * sde.alpha(t) / sde.sigma(t) ** 2) ** 2


def uniform(sde: LinearSDE, u: Tensor) -> Tensor:
    """Times uniform on [t_min, t_max] from u ~ U(0, 1) `[B]`."""
    return sde.t_min + u * (sde.t_max - sde.t_min)


def log_normal(sde: LinearSDE, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Times whose log(sigma / alpha) ~ N(mean, std^2), kept inside [t_min, t_max]. Karras et al. 2022 (NeurIPS), table 1."""
    check_number(std, "std", 0.0, open_low=True)
    ends = -sde.logsnr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device=u.device)) / 2
    low, high = torch.special.ndtr((ends - mean) / std)  # truncated, not clamped: no atoms at the ends
    z = torch.special.ndtri((low + u.double() * (high - low)).clamp(1e-300, 1 - 1e-16))
    return sde.time(-2 * (mean + std * z).clamp(*ends.tolist())).clamp(sde.t_min, sde.t_max)


def stratified(times: Times) -> Times:
    """Another distribution with u_i = (i + u_0) / B mod 1: less variance at no cost. Kingma et al. 2021 (NeurIPS), app. I.1."""

    def draw(sde: LinearSDE, u: Tensor) -> Tensor:
        i = torch.arange(len(u), dtype=u.dtype, device=u.device)
        return times(sde, (u[:1] + i / max(1, len(u))) % 1)

    return draw
