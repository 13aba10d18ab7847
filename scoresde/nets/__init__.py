"""Small networks `net(x, c_noise, cond=None) -> shape of x`: plain modules that know nothing of SDEs."""

from scoresde.nets.mlp import MLP
from scoresde.nets.unet import UNet

__all__ = ["MLP", "UNet"]
