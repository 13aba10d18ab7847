"""scoresde: continuous-time score-based diffusion. Any SDE, any solver, counted evaluations, exact likelihood.

The names here are the whole everyday vocabulary; the modules hold the functions one chooses among: `grid` (times),
`loss` (weights, time distributions), `parameterizations` (what a network predicts), `noise`, `metrics`, `checkpoint`.
"""

from . import checkpoint, grid, loss, metrics, nets, noise, parameterizations, solvers, variables
from .checks import NonFiniteError
from .denoiser import Denoiser, Preconditioned, Wrapped, flow, reverse_drift
from .exact import Empirical, Gaussian, Mixture
from .guidance import Clipped, Thresholded
from .likelihood import BitsPerDim, LogProb, Quantized, bits_per_dim, log_prob
from .loss import dsm_loss
from .nets import MLP, UNet
from .oracle import Oracle
from .parameterizations import Prediction
from .sample import Solution, decode, encode, sample, trajectory
from .sde import EDM, SDE, VE, VP, Cosine, DiscreteVP, LinearSDE, Rectified, SubVP, Tabulated
from .solvers import (
    DDIM,
    DEIS,
    IPNDM,
    MALA,
    RK4,
    AdamsBashforth,
    AdamsMoulton,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    Langevin,
    PredictorCorrector,
    Solver,
    StochasticSolver,
    TorchDiffEq,
    UniPC,
)
from .train import EMA, Step, fit

__version__ = "0.1.0"

__all__ = [
    "DDIM", "DEIS", "EDM", "EMA", "IPNDM", "MALA", "MLP", "RK4", "SDE", "VE", "VP", "AdamsBashforth", "AdamsMoulton",
    "Ancestral", "BitsPerDim", "Clipped", "Cosine", "DPMSolver", "DPMSolverPP", "Denoiser", "DiscreteVP", "Empirical",
    "Euler", "EulerMaruyama", "Gaussian", "Heun", "Langevin", "LinearSDE", "LogProb", "Mixture", "NonFiniteError", "Oracle",
    "Preconditioned", "Prediction", "PredictorCorrector", "Quantized", "Rectified", "Solution", "Solver", "Step",
    "StochasticSolver", "SubVP", "Tabulated", "Thresholded", "TorchDiffEq", "UNet", "UniPC", "Wrapped", "bits_per_dim",
    "checkpoint", "decode", "dsm_loss", "encode", "fit", "flow", "grid", "log_prob", "loss", "metrics", "nets", "noise",
    "parameterizations", "reverse_drift", "sample", "solvers", "trajectory", "variables",
]  # fmt: skip
