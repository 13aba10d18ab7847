"""README and docs run: blocks with a prompt as doctests, the others as scripts, in order, one namespace a page."""

import builtins
import doctest
import re
from pathlib import Path

import laws
import pytest
import test_laws
import torch

from scoresde import solvers

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_the_code_of_the_page_runs(page):
    namespace: dict[str, object] = {}
    blocks = BLOCK.findall(page.read_text())
    torch.manual_seed(0)  # a reader's script may draw from the global generator; the test repeats
    for block in blocks:
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, namespace, page.name, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(test, clear_globs=False)
            namespace.update(test.globs)
            vars(builtins).pop("_", None)  # the last value shown, which other code takes for gettext's
            assert runner.summarize(verbose=False).failed == 0
        else:
            exec(compile(block, str(page), "exec"), namespace)  # noqa: S102
    assert namespace


def test_links_between_pages_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_solver_of_the_page_gets_every_law(monkeypatch):
    """`docs/solvers.md`, "Your own solver": its class, put into `__all__`, is in every list of the laws, and obeys them."""
    page = (ROOT / "docs" / "solvers.md").read_text()
    (block,) = [b for b in BLOCK.findall(page) if "class TwoStep" in b]
    assert len(block.split("@dataclass")[1].split("\n\n\n")[0].splitlines()) <= 20
    namespace: dict[str, object] = {}
    exec(compile(block.split("\n\n\nassert")[0], "solvers.md", "exec"), namespace)  # noqa: S102
    monkeypatch.setattr(solvers, "TwoStep", namespace["TwoStep"], raising=False)
    monkeypatch.setattr(solvers, "__all__", [*solvers.__all__, "TwoStep"])
    (solver,) = [s for s in laws.every_solver() if type(s).__name__ == "TwoStep"]
    test_laws.test_order_in_x(solver, "VP")
    test_laws.test_order_in_log_p(solver, "VP")
    test_laws.test_schedule_invariance(solver)
    for name in laws.SIX:
        test_laws.test_every_step_count_to_sixty_is_counted_finite_and_without_repeats(solver, name)
        test_laws.test_float32_follows_float64(solver, name)
        test_laws.test_counted_nfe_is_a_counter_inside_the_denoiser(solver, name)
    test_laws.test_same_seeds_same_x_for_any_split_order_and_microbatch(solver)
    test_laws.test_nfe_is_a_ceiling_and_the_largest_that_fits(solver)


def test_the_tables_of_solvers_are_of_the_solvers_that_there_are():
    """`python docs/orders.py` has been run since a solver was added: each has its row, with its stated order and slopes that agree."""
    page = (ROOT / "docs" / "solvers.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    measured = {(r[0][3:-1], r[1]): r for r in rows if len(r) == 8}
    for solver in laws.FLOWS:
        for name in ["all (invariant)"] if solver.invariant else laws.SIX:
            row = measured.pop((repr(solver), name))
            assert int(row[2]) == solver.order
            assert int(row[3]) == solver.evaluations(10)
            slack = 0.3 if solver.order >= 4 else 0.15
            for slope in (float(row[4]), float(row[6])):
                assert solver.order - slack - 0.005 <= slope <= solver.order + 0.305
        assert any(r[0] == f"| `{solver!r}`" and len(r) == 7 for r in rows)
    assert not measured


def test_the_law_table_is_of_the_stochastic_solvers_that_there_are():
    """`python docs/stochastic_orders.py` has been run since one was added: each has its row, and what was measured is what it states."""
    page = (ROOT / "docs" / "stochastic.md").read_text()
    rows = {
        r[0][3:-1]: r
        for r in (line.rstrip(" |").split(" | ") for line in page.splitlines() if line.startswith("| `"))
        if len(r) == 7
    }
    for solver in laws.STOCHASTIC:
        _, weak, strong, evaluations, slopes, _, slope = rows.pop(repr(solver))
        assert (float(weak), float(strong), int(evaluations)) == (solver.weak_order, solver.strong_order, solver.evaluations(10))
        for found in slopes.split() if slopes != "–" else ():
            assert abs(float(found) - solver.weak_order) <= 0.105
        assert slope == "–" or abs(float(slope) - solver.strong_order) <= 0.155
    assert not rows
