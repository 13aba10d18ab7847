"""Write the summary of benchmarks/results/strong.json into docs/solvers.md: `python docs/strong.py`."""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import markers  # noqa: E402
import problems  # noqa: E402
import strong  # noqa: E402


def rows() -> list[str]:
    """Ours and our default over the best peer and the best of all, by budget."""
    table = json.loads(strong.OUT.read_text())["rows"]
    e = strong.Errors(table, list(problems.SDES), strong.BUDGETS)
    peer, own, top = (e.best(who)[1] for who in (~e.ours, e.ours, np.ones(len(e.names), dtype=bool)))
    sizes = {"digits": problems.PIXELS, "toy": problems.TOY, "image": problems.IMAGE}
    k = np.array([[e.where[strong.default_setting(n, sizes[p])] for p in e.problems] for n in e.budgets])
    rule = np.take_along_axis(e.B, k[None, None], 0)[0] / top
    _, floor_a = e.best(np.ones(len(e.names), dtype=bool))
    made = []
    for title, ratio in (
        ("our best / best peer: geometric mean", own / peer),
        ("`solver=None` / best of all: geometric mean", rule),
    ):
        made.append((title, [strong.geometric(ratio[:, i]) for i in range(len(e.budgets))], strong.geometric(ratio)))
    made.append(("the same: worst cell", [rule[:, i].max() for i in range(len(e.budgets))], rule.max()))
    on_a = e.over(e.A, np.take_along_axis(e.A, e.best(np.ones(len(e.names), dtype=bool))[0][None], 0)[0])
    on_b = e.over(e.B, floor_a)
    picks = [int(np.where(~e.ours, strong.geometric(on_a[:, i], 1), np.inf).argmin()) for i in range(len(e.budgets))]
    single = [on_b[k, i] for i, k in enumerate(picks)]
    made.append(("best single setting of any peer / best of all: geometric mean", [strong.geometric(r) for r in single], None))
    made.append(("the same: worst cell", [r.max() for r in single], None))
    heads = " | ".join(str(n) for n in e.budgets)
    lines = [f"| error on seed set B, settings chosen on A, by NFE | {heads} | all |", "|---" * (2 + len(e.budgets)) + "|"]
    for title, values, whole in made:
        lines.append(f"| {title} | " + " | ".join(f"{v:.2f}" for v in values) + f" | {'' if whole is None else f'{whole:.2f}'} |")
    return lines


if __name__ == "__main__":
    markers.fill(ROOT / "docs" / "solvers.md", "strong", "\n".join(rows()))
