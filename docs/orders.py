"""Write the tables of measured orders and errors in docs/solvers.md: `python docs/orders.py`. Measured with the code of tests/laws.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
import laws  # noqa: E402
import markers  # noqa: E402
import torch  # noqa: E402

BUDGETS = (10, 20, 40, 80, 160)


def orders() -> str:
    """Stated order, evaluations of ten steps, slope of the last doubling in x and in log p, errors at 384 steps."""
    sdes = laws.every_sde()
    lines = [
        "| solver | SDE | stated order | evaluations of 10 steps | slope in x | error in x, 384 steps | slope in log p | error in log p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for solver in laws.FLOWS:
        for name in ["VP"] if solver.invariant else laws.SIX:
            (ex, sx), (el, sl) = laws.order_in_x(solver, sdes[name]), laws.order_in_log_p(solver, sdes[name])
            where = "all (invariant)" if solver.invariant else name
            stated = f"| `{solver!r}` | {where} | {solver.order} | {solver.evaluations(10)} "
            lines.append(f"{stated}| {sx[-1]:.2f} | {ex[-1]:.1e} | {sl[-1]:.2f} | {el[-1]:.1e} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def full() -> str:
    """RMS error in x over the whole of [t_min, t_max] under VP, on the recommended grid, at budgets of evaluations."""
    sde = laws.every_sde()["VP"]
    heads = " | ".join(f"{n}" for n in BUDGETS)
    lines = [f"| solver | grid | {heads} |", "|---" * (2 + len(BUDGETS)) + "|"]
    for solver in laws.FLOWS:
        cells = " | ".join(f"{e:.1e}" if e is not None else "–" for e in laws.full_range(solver, sde, BUDGETS))
        lines.append(f"| `{solver!r}` | {solver.grid.__name__} | {cells} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, made in (("orders", orders()), ("full range", full())):
        markers.fill(HERE / "solvers.md", name, made)
