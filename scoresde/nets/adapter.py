"""A network of another library as `net(x, c_noise, cond)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scoresde.checks import check_count, shape_of

__all__ = ["FromDiffusers"]


class FromDiffusers(nn.Module):
    """A U-Net of diffusers (`UNet2DModel` and what is called like it): net(x, c, cond) = unet(x, c, class_labels=cond).sample.

    Its timestep is whatever the parameterization gives as c_noise. For a DDPM's network of eps, trained on the chain of
    sde = VP.from_betas(betas), whose step i is t = (i + 1) / N:

        def steps(sde, t):
            c_skip, c_out, c_in, _ = parameterizations.eps(sde, t)
            return c_skip, c_out, c_in, len(sde.betas) * t - 1

    Args:
        unet: the module.
        unlabelled: the class that stands for no label, for cond None and for its rows that are -1; None if there is none.

    Raises:
        TypeError, ValueError: an argument is not what is said above.
    """

    def __init__(self, unet: nn.Module, unlabelled: int | None = None) -> None:
        super().__init__()
        if not isinstance(unet, nn.Module):
            raise TypeError(f"unet is {shape_of(unet)}; wanted an nn.Module such as diffusers' UNet2DModel")
        self.unet = unet
        self.unlabelled = None if unlabelled is None else check_count(unlabelled, "unlabelled", 0)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the network's output for x [B, C, H, W], timesteps c_noise [B] and int64 labels cond [B] or None."""
        if self.unlabelled is not None:
            none = torch.full(c_noise.shape, self.unlabelled, device=x.device)
            cond = none if cond is None else torch.where(cond < 0, none, cond)
        out = self.unet(x, c_noise) if cond is None else self.unet(x, c_noise, class_labels=cond)
        return out.sample
