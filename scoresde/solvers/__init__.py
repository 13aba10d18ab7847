"""Solvers: maps from time t to time s. One file a family. `__all__` is what the tests and the tables loop over."""

from .adaptive import TorchDiffEq
from .base import Solver, StochasticSolver
from .corrector import MALA, Langevin, PredictorCorrector
from .exponential import Multistep as Multistep
from .exponential import SingleStep as SingleStep
from .exponential import Tableau as Tableau
from .families import DDIM, DEIS, IPNDM, RK4, AdamsBashforth, AdamsMoulton, DPMSolver, DPMSolverPP, Euler, Heun, UniPC
from .stochastic import Ancestral, EulerMaruyama
from .weights import bh1 as bh1
from .weights import bh2 as bh2
from .weights import exact as exact

__all__ = [
    "DDIM", "DEIS", "IPNDM", "MALA", "RK4", "AdamsBashforth", "AdamsMoulton", "Ancestral", "DPMSolver", "DPMSolverPP", "Euler",
    "EulerMaruyama", "Heun", "Langevin", "PredictorCorrector", "Solver", "StochasticSolver", "TorchDiffEq", "UniPC",
]  # fmt: skip
