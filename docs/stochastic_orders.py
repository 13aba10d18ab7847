"""Write the law table of docs/stochastic.md: `python docs/stochastic_orders.py` (20 minutes). Measured with the code of tests/laws.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
import laws  # noqa: E402
import markers  # noqa: E402
import test_stochastic as tests  # noqa: E402
import torch  # noqa: E402

NAMES = ("VP", "VE", "EDM")


def row(solver: laws.solvers.StochasticSolver) -> str:
    """Stated orders, evaluations, weak slopes and deviation errors on three SDEs, strong slope along Brownian paths."""
    weak = errors = strong = "–"
    if solver in tests.CONSISTENT:
        counts = tests.counts_of(solver)
        weak = " ".join(f"{laws.weak_errors(solver, tests.SDES[n], counts)[1][0]:.2f}" for n in NAMES)
        errors = " ".join(f"{100 * tests.deviation(solver, tests.SDES[n])[0]:+.2g}" for n in NAMES)
    if solver.strong_order >= 1:  # 1/2 is that of a switch, whose error has jumps: over many of them, in the tests
        strong = f"{laws.strong_slope(solver, 'VE')[1]:.2f}"
    stated = f"| `{solver!r}` | {solver.weak_order:g} | {solver.strong_order:g} | {solver.evaluations(10)} "
    return f"{stated}| {weak} | {errors} | {strong} |"


def table() -> str:
    """A row a stochastic solver of the tests."""
    lines = [
        "| solver | weak | strong | evaluations of 10 steps | weak slope, VP VE EDM "
        "| error of the deviation at 1,000 steps, %, VP VE EDM | strong slope |",
        "|---|---|---|---|---|---|---|",
    ]
    for solver in laws.STOCHASTIC:
        lines.append(row(solver))
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    markers.fill(HERE / "stochastic.md", "laws", table())
