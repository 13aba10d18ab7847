"""scoresde: continuous-time score-based diffusion. Any SDE, any solver, counted evaluations, exact likelihood.

The names here are the whole everyday vocabulary; the modules hold the functions one chooses among: `grid` (times),
`loss` (weights, time distributions), `objectives`, `parameterizations` (what a network predicts), `data`, `noise`, `metrics`, `checkpoint`.
"""

from . import (
    checkpoint,
    data,
    divergence,
    ema,
    grid,
    loss,
    metrics,
    nets,
    noise,
    objectives,
    orders,
    parameterizations,
    solvers,
    variables,
)
from .bits import BitsPerDim, Importance, Quantized, TruncatedNormal, Uniform, bits_per_dim
from .bounds import Elbo, elbo
from .checks import NonFiniteError, Status, UnfinishedError
from .denoiser import Denoiser, Preconditioned, Wrapped, flow, reverse_drift
from .ema import EMA, PowerEMA
from .exact import Empirical, Gaussian, Mixture
from .guidance import Clipped, Thresholded
from .likelihood import log_prob
from .loss import dsm_loss
from .nets import MLP, DiT, NCSNpp, UNet
from .oracle import Oracle
from .parameterizations import Prediction
from .pilot import Frozen, freeze
from .sample import decode, encode, sample, slerp
from .sde import EDM, SDE, VE, VP, Cosine, DiscreteVP, LinearSDE, Rectified, SubVP, Tabulated
from .solve import LogProb, Solution, trajectory
from .solvers import (
    DDIM,
    DEIS,
    ERSDE,
    IPNDM,
    MALA,
    RK4,
    SEEDS,
    SRA1,
    SRA3,
    AdamsBashforth,
    AdamsMoulton,
    Adaptive,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    Band,
    Churn,
    Dopri5,
    Dopri8,
    DPMAdaptive,
    DPMSolver,
    DPMSolverPP,
    Euler,
    EulerMaruyama,
    Heun,
    ImprovedEuler,
    Langevin,
    PredictorCorrector,
    Restart,
    ReverseDiffusion,
    SASolver,
    ScipyIVP,
    SDEDPMSolverPP,
    Solver,
    StochasticHeun,
    StochasticSolver,
    TorchDiffEq,
    TorchSDE,
    UniPC,
)
from .train import Step, fit
from .training import Training

__version__ = "0.1.0"

__all__ = [
    "DDIM", "DEIS", "EDM", "EMA", "ERSDE", "IPNDM", "MALA", "MLP", "RK4", "SDE", "SEEDS", "SRA1", "SRA3", "VE", "VP",
    "AdamsBashforth", "AdamsMoulton", "Adaptive", "AdaptiveSDE", "Ancestral", "AnnealedLangevin", "Band",
    "BitsPerDim", "Churn", "Clipped", "Cosine", "DPMAdaptive", "DPMSolver", "DPMSolverPP", "Denoiser", "DiT",
    "DiscreteVP", "Dopri5", "Dopri8", "Elbo", "Empirical", "Euler", "EulerMaruyama", "Frozen", "Gaussian", "Heun",
    "Importance", "ImprovedEuler", "Langevin", "LinearSDE", "LogProb", "Mixture", "NCSNpp", "NonFiniteError",
    "Oracle", "PowerEMA", "Preconditioned", "Prediction", "PredictorCorrector", "Quantized", "Rectified", "Restart",
    "ReverseDiffusion", "SASolver", "SDEDPMSolverPP", "ScipyIVP", "Solution", "Solver", "Status", "Step",
    "StochasticHeun", "StochasticSolver", "SubVP", "Tabulated", "Thresholded", "TorchDiffEq", "TorchSDE", "Training",
    "TruncatedNormal", "UNet", "UnfinishedError", "UniPC", "Uniform", "Wrapped", "bits_per_dim", "checkpoint", "data",
    "decode", "divergence", "dsm_loss", "elbo", "ema", "encode", "fit", "flow", "freeze", "grid", "log_prob", "loss",
    "metrics", "nets", "noise", "objectives", "orders", "parameterizations", "reverse_drift", "sample", "slerp",
    "solvers", "trajectory", "variables",
]  # fmt: skip
