"""The demo, small, and the pieces it stands on."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from scoresde import cli, compare, demo
from scoresde.exact import Gaussian
from scoresde.sde import VP
from scoresde.solvers import DDIM, Heun, TorchDiffEq

SMALL = demo.Settings(
    steps=4, batch=16, channels=8, samples=10, nfes=(5,), sde_nfes=(), tolerances=(1e-1,), likelihood_digits=4, likelihood_noise=2,
    likelihood_steps=2,
)  # fmt: skip
FILES = {
    "results.csv", "results.json", "report.md", "nfe_fid.png", "samples.png", "trajectories.png", "loss.png", "likelihood.png",
    "VP/model.safetensors", "VP/config.json", "VE/model.safetensors", "VE/config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("demo") / "a", []
    return folder, demo.run(folder, SMALL, say=said.append), said


def test_a_run_writes_everything_and_prints_an_estimate_first(a_run):
    folder, result, said = a_run
    assert all((folder / name).stat().st_size > 0 for name in FILES)
    assert "minutes on this machine" in said[0]
    assert any("sliced W" in text for text in said)
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(demo.rows(SMALL)) + 2 == len(result["rows"])
    assert {row["problem"] for row in rows} == {"data", "VP", "VE"}
    stored = json.loads((folder / "results.json").read_text())
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["features"]["sha256"] in (folder / "report.md").read_text()
    assert stored["features"]["sha256"][:8] in said[1]
    assert [row["images"] for row in stored["likelihood"]] == ["held-out digits", "noise images"] * 2


@pytest.mark.slow
def test_same_seeds_same_numbers(a_run, tmp_path):
    _, a, _ = a_run
    b = demo.run(tmp_path / "b", SMALL)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(a["rows"]) == strip(b["rows"])
    assert a["likelihood"] == b["likelihood"]
    assert a["features"] == b["features"]


def test_counted_nfe_is_within_the_budget(a_run):
    _, result, _ = a_run
    solved = [row for row in result["rows"] if row["problem"] != "data"]
    assert all(row["nfe"] <= row["budget"] for row in solved if row["budget"] is not None)
    assert all(row["nfe"] > 5 for row in solved if row["budget"] is None)


def test_an_earlier_run_is_kept(a_run, capsys):
    folder, _, _ = a_run
    before = (folder / "results.csv").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        demo.run(folder, SMALL)
    assert cli.main(["demo", "--out", str(folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "results.csv").read_bytes() == before


def test_the_networks_are_small_and_the_halves_fixed():
    net = demo.network(VP(), demo.Settings()).net
    assert sum(p.numel() for p in net.parameters()) <= 400_000
    train, _, test, _ = demo.digits(0)
    assert len(train) + len(test) == 1797
    assert torch.equal(train, demo.digits(0)[0])
    assert not torch.equal(train, demo.digits(1)[0])


def test_every_row_of_the_issue_is_there():
    rows = demo.rows(demo.FULL)
    assert len({row.key for row in rows}) == len(rows) == 87
    assert [r.nfe for r in rows if r.problem == "VP" and type(r.solver).__name__ == "EulerMaruyama"] == [
        10,  # at 5 its steps are too long for the drift
        20,
        50,
        100,
        200,
        1000,
    ]
    assert [r.solver.rtol for r in rows if isinstance(r.solver, TorchDiffEq)] == [1e-1, 1e-2, 1e-3, 1e-4, 1e-5] * 2


def test_help_lists_demo():
    text = subprocess.run([sys.executable, "-m", "scoresde.cli", "--help"], capture_output=True, text=True, check=False)
    assert text.returncode == 0
    assert "demo" in text.stdout
    with pytest.raises(SystemExit) as stop:
        cli.main(["no-such-command"])
    assert stop.value.code == 2


def make_gaussian():
    return Gaussian(VP(), torch.zeros(2, dtype=torch.float64), 0.5)


def test_a_comparison_resumes_and_splits_by_sample(tmp_path):
    done, rows = (
        tmp_path / "rows.jsonl",
        [compare.Row("g", DDIM(), 5), compare.Row("g", Heun(), 9, "H"), compare.Row("g", TorchDiffEq())],
    )
    score = lambda x: {"std": float(x.std())}
    with compare.pool(2) as workers:
        args = (workers, 2, rows, {"g": make_gaussian}, (2,), range(11), score, done)
        first = list(compare.run(*args))
        again = list(compare.run(*args))
    assert [x.shape for _, _, x in first] == [(11, 2)] * 3
    assert [x for _, _, x in again] == [None] * 3
    assert [result for _, result, _ in first] == [result for _, result, _ in again]
    assert [result["solver"] for _, result, _ in first] == ["DDIM", "H", "TorchDiffEq"]


def test_tables():
    text = compare.table([{"a": 1.0}, {"a": 2.5, "b": "x"}], {"A": "{a:.1f}", "long name": "{b}"})
    assert text.splitlines() == ["| A   | long name |", "|-----|-----------|", "| 1.0 | -         |", "| 2.5 | x         |"]
