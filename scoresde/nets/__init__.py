"""Networks `net(x, c_noise, cond=None) -> shape of x`: plain modules that know nothing of SDEs."""

from scoresde.nets.adapter import FromDiffusers
from scoresde.nets.dit import DiT
from scoresde.nets.mlp import MLP
from scoresde.nets.ncsnpp import NCSNpp
from scoresde.nets.presets import preset
from scoresde.nets.unet import UNet

__all__ = ["MLP", "DiT", "FromDiffusers", "NCSNpp", "UNet", "preset"]
