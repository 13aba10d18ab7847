"""benchmarks/scaling.py: its tables are those of docs/scaling.md, and in small it runs."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/scaling.json", ROOT / "docs/scaling.md"


@pytest.fixture
def tables(monkeypatch):
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("an installed package without the benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scaling_tables")


def test_the_page_has_the_tables_of_the_results(tables, tmp_path):
    """`python benchmarks/scaling.py --table --into docs/scaling.md` has been run since the results changed."""
    if not RESULTS.exists():
        pytest.skip("nothing is measured yet")
    copy = shutil.copy(PAGE, tmp_path)
    tables.fill(Path(copy), tables.tables(json.loads(RESULTS.read_text())))
    assert Path(copy).read_text() == PAGE.read_text()


def test_numbers_are_written_in_the_unit_that_reads_best(tables):
    assert [tables.amount(1.5e12, "B"), tables.amount(12), tables.amount(3.07e9)] == ["1.5 TB", "12", "3.07 G"]
    words = [tables.span(s) for s in (3e-5, 0.02, 5, 600, 10_000, 1e6)]
    assert words == ["30 µs", "20 ms", "5 s", "10 min", "2.78 h", "11.6 days"]


@pytest.mark.slow
def test_in_small_it_runs_and_two_make_what_one_makes(tables, tmp_path):
    out = tmp_path / "scaling.json"
    words = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--quick", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert [found[name]["same"] for name in ("sampling", "likelihood", "evaluate")] == [True] * 3
    assert found["training"]["bytes sent a step"] >= 2 * found["training"]["gradient bytes"]
    assert {"words", "networks", "steps", "drawing", "reading", "files", "merging"} <= found.keys()
