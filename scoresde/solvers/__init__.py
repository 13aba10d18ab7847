"""Solvers: maps from time t to time s. One file a family."""

from .adaptive import TorchDiffEq
from .base import Solver, StochasticSolver
from .corrector import MALA, Langevin, PredictorCorrector
from .exponential import DDIM, DPMSolverPP
from .flow import Euler, Heun
from .stochastic import Ancestral, EulerMaruyama

__all__ = [
    "DDIM",
    "MALA",
    "Ancestral",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "PredictorCorrector",
    "Solver",
    "StochasticSolver",
    "TorchDiffEq",
]
