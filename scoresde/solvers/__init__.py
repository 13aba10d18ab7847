"""Solvers: maps from time t to time s. One file a family."""

from .adaptive import TorchDiffEq
from .base import Solver, StochasticSolver
from .corrector import MALA, Langevin, PredictorCorrector
from .exponential import Multistep, SingleStep, Tableau
from .families import DDIM, DEIS, IPNDM, RK4, AdamsBashforth, AdamsMoulton, DPMSolver, DPMSolverPP, Euler, Heun, UniPC
from .stochastic import Ancestral, EulerMaruyama
from .weights import bh1, bh2, exact

__all__ = [
    "DDIM", "DEIS", "IPNDM", "MALA", "RK4", "AdamsBashforth", "AdamsMoulton", "Ancestral", "DPMSolver", "DPMSolverPP", "Euler",
    "EulerMaruyama", "Heun", "Langevin", "PredictorCorrector", "Solver", "StochasticSolver", "TorchDiffEq", "UniPC",
]  # fmt: skip
