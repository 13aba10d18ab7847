"""Write the table of measured orders in docs/solvers.md: `python docs/orders.py`. The measurements are those of tests/laws.py."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
import laws  # noqa: E402
import torch  # noqa: E402

MARK = re.compile(r"(<!-- orders -->\n).*(<!-- /orders -->)", re.DOTALL)


def table() -> str:
    """A Markdown table: stated order, evaluations of ten steps, slope of the last doubling in x and in log p, errors at 384 steps."""
    torch.set_num_threads(1)
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
    return "\n".join(lines)


if __name__ == "__main__":
    page = HERE / "solvers.md"
    page.write_text(MARK.sub(lambda m: m[1] + table() + "\n" + m[2], page.read_text()))
