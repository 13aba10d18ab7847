"""azula's deterministic samplers, running in float64, and ours on the same times.

What each integrates: DDIM and Euler, Heun, zAB: eps over rho. vAB: eps - x0 over tau = sigma / (alpha + sigma). zEAB: eps, polynomial in
log rho, over rho. xEAB: x0, polynomial in log rho, over 1 / rho. All multistep ones ramp up; none ends at sigma = 0.
REABSampler is left out: its last line has sigma_t where sigma_s belongs, which leaves it of order 1.
"""

import azula.sample as theirs
import pytest
from peers import EXACT, Problem, agree, azula_run, karras, problems

from scoresde import DDIM, DEIS, AdamsBashforth, DPMSolverPP, Euler, Heun, variables
from scoresde.solvers import exact

RHO = karras(16)
SAMPLERS = {  # name: (azula's, its settings, ours)
    "DDIM": (theirs.DDIMSampler, {}, DDIM()),
    "Euler": (theirs.EulerSampler, {}, Euler(variables.eps)),
    "Heun": (theirs.HeunSampler, {}, Heun(variables.eps)),
}
for n in (1, 2, 3, 4):
    SAMPLERS[f"zAB{n}"] = (theirs.zABSampler, dict(order=n), AdamsBashforth(n, variables.eps, startup=False))
    SAMPLERS[f"vAB{n}"] = (theirs.vABSampler, dict(order=n), AdamsBashforth(n, variables.velocity, startup=False))
    SAMPLERS[f"zEAB{n}"] = (theirs.zEABSampler, dict(order=n), DEIS(n - 1, variables.lam, startup=False))
    SAMPLERS[f"xEAB{n}"] = (theirs.xEABSampler, dict(order=n), AdamsBashforth(n, variables.x0, startup=False))
    if n < 4:
        SAMPLERS[f"xEAB{n} = DPM++"] = (theirs.xEABSampler, dict(order=n), DPMSolverPP(n, weights=exact, startup=False))


@problems
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(name: str, problem: Problem):
    peer, settings, solver = SAMPLERS[name]
    x = problem.start(RHO)
    agree(problem.ours(solver, x, RHO), azula_run(peer, problem, x, RHO, **settings), EXACT)
