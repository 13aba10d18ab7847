"""Solvers: maps from time t to time s. One file a family. `__all__` is what the tests and the tables loop over."""

from .adaptive import Adaptive, AdaptiveSDE, Dopri5, Dopri8, DPMAdaptive
from .base import Solver, StochasticSolver
from .control import Controlled as Controlled
from .corrector import MALA, AnnealedLangevin, Langevin, PredictorCorrector
from .exponential import Multistep as Multistep
from .exponential import SingleStep as SingleStep
from .families import DDIM, DEIS, IPNDM, RK4, AdamsBashforth, AdamsMoulton, DPMSolver, DPMSolverPP, Euler, Heun, UniPC
from .foreign import ScipyIVP, TorchDiffEq, TorchSDE
from .reverse import ERSDE, SEEDS, SASolver, SDEDPMSolverPP, StochasticHeun
from .reverse import Band as Band
from .reverse import NoisyMultistep as NoisyMultistep
from .reverse import NoisySingleStep as NoisySingleStep
from .reverse import Phi as Phi
from .reverse import Tau as Tau
from .stochastic import SRA1, SRA3, Ancestral, EulerMaruyama, ImprovedEuler, ReverseDiffusion
from .tableau import Tableau as Tableau
from .weights import bh1 as bh1
from .weights import bh2 as bh2
from .weights import exact as exact
from .weights import taylor as taylor
from .wrappers import Churn, Restart

__all__ = [
    "DDIM", "DEIS", "ERSDE", "IPNDM", "MALA", "RK4", "SEEDS", "SRA1", "SRA3", "AdamsBashforth", "AdamsMoulton", "Adaptive",
    "AdaptiveSDE", "Ancestral", "AnnealedLangevin", "Churn", "DPMAdaptive", "DPMSolver", "DPMSolverPP", "Dopri5", "Dopri8", "Euler",
    "EulerMaruyama", "Heun", "ImprovedEuler", "Langevin", "PredictorCorrector", "Restart", "ReverseDiffusion", "SASolver",
    "SDEDPMSolverPP", "ScipyIVP", "Solver", "StochasticHeun", "StochasticSolver", "TorchDiffEq", "TorchSDE", "UniPC",
]  # fmt: skip
