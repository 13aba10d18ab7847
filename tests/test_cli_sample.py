"""`scoresde sample`: a sample is a function of its seed however the work is cut up, nothing is lost by a kill or passes for whole."""

import csv
import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ranks import Failed

import scoresde as s
from scoresde import checkpoint, cli, figures, generate, images, pages, resume
from scoresde.bits import Quantized
from scoresde.checks import NonFiniteError
from scoresde.generate import Settings, parse_seeds, parse_solver, samples_of
from scoresde.parallel import Elsewhere, Group
from scoresde.seeds import Seeds

ROOT = Path(s.__file__).parent.parent
SHAPE = (1, 4, 5)


def model(shape=SHAPE, classes=0, seed=0):
    net = s.MLP(shape, width=8, depth=1, emb=4, classes=classes, seed=seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return s.Preconditioned(net, s.VP())


def settings(seeds="0-10", **kwargs):
    return Settings(**{"seeds": parse_seeds(seeds), "nfe": 5, "batch": 4, **kwargs})


def run(folder, out, seeds="0-10", *, processes=1, overwrite=False, say=lambda _: None, **kwargs):
    return generate.run(folder, out, settings(seeds, **kwargs), processes=processes, overwrite=overwrite, say=say)


def tree(out, but=("summary.json",)):
    """All files by name, but those that hold what may differ from run to run."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name not in {*but, ".lock"}}


def summary(out):
    return {name: value for name, value in json.loads((out / "summary.json").read_text()).items() if name != "run"}


def rows(out, name="samples.csv"):
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def shards(out):
    """Everything in the npz files, by seed."""
    found = {}
    for path in sorted(out.glob("*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            assert list(shard["seeds"]) == sorted(shard["seeds"])
            found |= {int(k): (x, int(y)) for k, x, y in zip(shard["seeds"], shard["x"], shard["labels"], strict=True)}
    return found


def direct(denoiser, seeds, batch=4, shape=SHAPE, dtype=torch.float32, **kwargs):
    """The library's own samples, whole batches of consecutive seeds as the command makes them."""
    kwargs = kwargs or {"nfe": 5}
    found = {}
    for b in sorted({seed // batch * batch for seed in seeds}):
        mates = range(b, b + batch)
        x = s.sample(denoiser, (batch, *shape), seeds=mates, microbatch=batch, dtype=dtype, **kwargs).x
        found |= dict(zip(mates, x, strict=True))
    return torch.stack([found[seed] for seed in seeds])


def png(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A model and the files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("sample")
    checkpoint.save(folder / "model", model())
    run(folder / "model", folder / "whole")
    return folder


# --- what is written -----------------------------------------------------------------------------------------------------
def test_the_files_of_a_run(there):
    out, said = there / "whole", []
    names = [f"samples/{i:08d}.png" for i in range(11)]
    assert sorted(tree(out, but=())) == sorted([*names, "grid.png", "samples.csv", "settings.json", "summary.json"])
    written, found = rows(out), summary(out)
    assert [int(row["seed"]) for row in written] == list(range(11))
    assert [row["file"] for row in written] == names
    assert {(row["label"], row["nfe"], row["status"]) for row in written} == {("-1", "5", "0")}
    assert (found["n"], found["nfe"], found["nfe_mean"], found["seeds"], found["shape"]) == (11, 5, 5, "0-10", list(SHAPE))
    assert found["ledger"] == {"score": 4, "denoise": 1, "rejected": 0, "network": 5}
    assert found["solver"] == repr(s.sample(model(), (1, *SHAPE), nfe=5, seeds=[0]).solver)
    assert found["checkpoint_sha256"] == json.loads((there / "model" / "config.json").read_text())["sha256"]
    assert (found["steps"], found["batch"], found["low"], found["high"], found["levels"]) == (4, 4, -1, 1, 256)
    assert found["versions"]["torch"] == torch.__version__
    before = tree(out, but=())
    run(there / "model", out, say=said.append)
    assert "all 11 samples are there: nothing to compute" in said[0]
    assert tree(out, but=()) == before
    # what was written is what the library reads as images of that many levels
    assert images.load(out / "samples", SHAPE).count == 11


def test_a_file_is_the_sample_rounded_to_its_cell(there):
    """Nearest centre of a cell, as `Quantized`: never cut off towards zero."""
    x = direct(model(), range(11))
    stored = np.stack([png(there / "whole" / "samples" / f"{i:08d}.png") for i in range(11)])[:, None]
    assert np.array_equal(stored, Quantized().to_levels(x).numpy())
    inside = x.abs() < 1
    assert inside.any()
    assert not inside.all()  # and what is beyond the range is at its end
    error = (Quantized().to_model(torch.from_numpy(stored)) - x).abs()
    assert float(error[inside].max()) <= Quantized().width / 2 * (1 + 1e-5)
    assert float(error[inside].max()) > 0.9 * Quantized().width / 2
    assert set(stored[(x >= 1).numpy()]) <= {255}
    assert set(stored[(x <= -1).numpy()]) <= {0}


def test_the_grid_shows_the_first(there, tmp_path):
    found = png(there / "whole" / "grid.png")
    assert found.shape == (3 * 5 - 1, 4 * 6 - 1)  # 11 images of 4 x 5, in rows of 4
    for i in range(11):
        r, c = divmod(i, 4)
        assert np.array_equal(found[5 * r : 5 * r + 4, 6 * c : 6 * c + 5], png(there / "whole" / "samples" / f"{i:08d}.png"))
    run(there / "model", tmp_path, "0-3", levels=5)
    assert {p for i in range(4) for p in png(tmp_path / f"samples/{i:08d}.png").flat} <= set(range(5))  # as they are
    assert set(png(tmp_path / "grid.png").flat) <= {round(k * 255 / 4) for k in range(5)}  # to be looked at
    sheet = figures.sheet(np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2))
    assert sheet.shape == (3, 2, 5)
    assert set(sheet[:, :, 2].flat) == {255}


def test_colour(tmp_path):
    shape = (3, 4, 4)
    checkpoint.save(tmp_path / "model", model(shape))
    run(tmp_path / "model", tmp_path / "out", "0-5")
    wanted = Quantized().to_levels(direct(model(shape), range(6), shape=shape)).numpy()
    for i in range(6):
        assert np.array_equal(np.moveaxis(png(tmp_path / f"out/samples/{i:08d}.png"), -1, 0), wanted[i])
    assert png(tmp_path / "out" / "grid.png").shape == (2 * 5 - 1, 3 * 5 - 1, 3)


def test_npz_has_what_png_has(there, tmp_path):
    found = run(there / "model", tmp_path, format="npz")
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == [f"samples-{a:08d}-{b:08d}.npz" for a, b in ((0, 3), (4, 7), (8, 11))]
    stored = shards(tmp_path)
    assert sorted(stored) == list(range(11))
    assert all(np.array_equal(x[0], png(there / "whole" / "samples" / f"{i:08d}.png")) and y == -1 for i, (x, y) in stored.items())
    assert {x.dtype for x, _ in stored.values()} == {np.dtype(np.uint8)}
    assert (tmp_path / "grid.png").read_bytes() == (there / "whole" / "grid.png").read_bytes()
    assert [row["file"] for row in rows(tmp_path)] == [f"samples-{i:08d}-{i + 3:08d}.npz" for i in (0, 4, 8) for _ in range(4)][:11]
    other = {"format": "png", "run": 0, "sha256": 0}  # the table names other files
    assert {**found, **other} == {**summary(there / "whole"), **other}


def test_vectors_are_floats_as_they_are(tmp_path):
    checkpoint.save(tmp_path / "model", model((3,)))
    found = run(tmp_path / "model", tmp_path / "out", dtype="float64")
    stored = shards(tmp_path / "out")
    x = np.stack([stored[i][0] for i in range(11)])
    assert np.array_equal(x, direct(model((3,)), range(11), shape=(3,), dtype=torch.float64).numpy())
    assert (found["levels"], found["low"], found["format"]) == (None, None, "npz")
    assert not (tmp_path / "out" / "grid.png").exists()
    with pytest.raises(ValueError, match=r"format is png, and the model's samples are \[3\]"):
        run(tmp_path / "model", tmp_path / "other", format="png")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("levels", [None, 1000], ids=str)
def test_images_beyond_eight_bits(levels, there, tmp_path):
    run(there / "model", tmp_path, "0-3", levels=levels)
    x, stored = direct(model(), range(4)), shards(tmp_path)
    wanted = x if levels is None else Quantized(levels).to_levels(x)
    assert np.array_equal(np.stack([stored[i][0] for i in range(4)]), wanted.numpy())
    assert (tmp_path / "grid.png").exists() == (levels is not None)


def test_the_range_is_that_of_the_training(there, tmp_path):
    """From config.json of a training run where it has it, unless one is given."""
    config = {**checkpoint.describe(model()), "data": {"low": -2.0, "high": 3.0}}
    (tmp_path / "run").mkdir()
    checkpoint.write(
        tmp_path / "run" / "checkpoints", 7, {"model": model().net.state_dict()}, optimizer=None, config=config, state={}
    )
    x = direct(model(), range(4))
    for name, more, cells in (("a", {}, Quantized(256, -2, 3)), ("b", {"low": 0.0}, Quantized(256, 0, 3))):
        run(tmp_path / "run", tmp_path / name, "0-3", **more)
        stored = np.stack([png(tmp_path / name / f"samples/{i:08d}.png") for i in range(4)])[:, None]
        assert np.array_equal(stored, cells.to_levels(x).numpy())
        assert (summary(tmp_path / name)["low"], summary(tmp_path / name)["high"]) == (cells.low, cells.high)


def test_the_weights_of_a_training_run(tmp_path):
    """The newest step; the first average, or those asked for; other ones are another run."""
    one, two, three = (model(seed=seed) for seed in (1, 2, 3))
    config = {**checkpoint.describe(one), "emas": ["ema_0.9", "ema_0.99"]}
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        tensors = {name: m.net.state_dict() for name, m in (("model", one), ("ema_0.9", two), ("ema_0.99", three))}
        checkpoint.write(tmp_path / "run" / "checkpoints", step, tensors, optimizer=None, config=config, state={})
    for weights, denoiser in ((None, two), ("model", one), ("ema_0.99", three)):
        out = tmp_path / f"out {weights}"
        found = run(tmp_path / "run", out, "0-3", format="npz", levels=None, weights=weights)
        assert np.array_equal(np.stack([x for x, _ in shards(out).values()]), direct(denoiser, range(4)).numpy())
        assert found["checkpoint"].endswith("step-00000002")
        assert found["weights"] == weights
    more = {"format": "npz", "levels": None}
    run(tmp_path / "run", tmp_path / "out None", "0-5", weights="ema_0.9", **more)  # the same by its name
    with pytest.raises(FileExistsError, match="checkpoint_sha256 was"):
        run(tmp_path / "run", tmp_path / "out None", "0-3", weights="model", **more)
    with pytest.raises(ValueError, match="weights is 'ema_1'"):
        run(tmp_path / "run", tmp_path / "none", weights="ema_1")


# --- labels --------------------------------------------------------------------------------------------------------------
def test_labels(there, tmp_path, capsys):
    """None, one for all, or by seed; a label belongs to the seed whatever is asked for."""
    denoiser = model(classes=3)
    checkpoint.save(tmp_path / "model", denoiser)
    cases = {None: [-1] * 4, 2: [2] * 4, "cycle": [0, 1, 2, 0]}
    for labels, each in cases.items():
        out = tmp_path / str(labels)
        run(tmp_path / "model", out, "0-3", labels=labels, format="npz", levels=None)
        assert ("the model has 3 classes" in capsys.readouterr().err) == (labels is None)
        stored = shards(out)
        cond = None if labels is None else torch.tensor(each)
        assert [y for _, y in stored.values()] == each
        assert [int(row["label"]) for row in rows(out)] == each
        assert np.array_equal(np.stack([x for x, _ in stored.values()]), direct(denoiser.condition(cond), range(4)).numpy())
    run(tmp_path / "model", tmp_path / "part", "6,13", labels="cycle")
    assert [row["label"] for row in rows(tmp_path / "part")] == ["0", "1"]
    with pytest.raises(ValueError, match=r"labels is 3; the model has classes 0 \.\. 2"):
        run(tmp_path / "model", tmp_path / "none", labels=3)
    with pytest.raises(ValueError, match="the model has no classes"):
        run(there / "model", tmp_path / "none", labels="cycle")
    assert not (tmp_path / "none").exists()


# --- the same bits -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize("order", [["10", "3-4", "0-10"], ["0", "1", "9,2", "5-10", "0-10"], ["4-7", "0-3,8-10", "0-10"]], ids=str)
def test_in_pieces_and_in_any_order(order, format, there, tmp_path):
    whole = there / "whole" if format == "png" else tmp_path / "whole"
    run(there / "model", whole, format=format)
    for seeds in order:
        found = run(there / "model", tmp_path / "out", seeds, format=format)
        assert found["n"] == parse_seeds(seeds).count
    assert tree(tmp_path / "out") == tree(whole)
    assert summary(tmp_path / "out") == summary(whole)


def test_a_part_is_that_part_of_the_whole(there, tmp_path):
    run(there / "model", tmp_path, "2,7-8")
    whole = tree(there / "whole")
    part = {name: data for name, data in tree(tmp_path).items() if name.startswith("samples/")}
    assert sorted(part) == [f"samples/{i:08d}.png" for i in (2, 7, 8)]
    assert all(whole[name] == data for name, data in part.items())
    assert [row["seed"] for row in rows(tmp_path)] == ["2", "7", "8"]


@pytest.mark.parametrize(
    "solver", ["Dopri5:rtol=0.1:atol=0.1", "TorchDiffEq:rtol=0.1:atol=0.1", "SDEDPMSolverPP:2", "Churn:Heun:10"]
)
def test_solvers_of_all_kinds(solver, there, tmp_path):
    """Adaptive, with mates that matter, stochastic, and noise around another: a part has the bits of the whole."""
    nfe = None if "tol" in solver else 9
    run(there / "model", tmp_path / "whole", "0-6", solver=solver, nfe=nfe)
    run(there / "model", tmp_path / "part", "1,6", solver=solver, nfe=nfe)
    for i in (1, 6):
        name = f"samples/{i:08d}.png"
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [row for row in rows(tmp_path / "whole") if row["seed"] in "16"] == rows(tmp_path / "part")
    assert summary(tmp_path / "part")["solver"] == repr(parse_solver(solver))


def test_the_largest_seeds(there, tmp_path):
    last = 2**64 - 1
    run(there / "model", tmp_path, f"{last - 1}-{last}", batch=6)  # whose last block is short
    assert [row["seed"] for row in rows(tmp_path, f"samples-{last // 50_004 * 50_004}.csv")] == [str(last - 1), str(last)]
    block = range(last // 6 * 6, last + 1)
    x = s.sample(model(), (len(block), *SHAPE), nfe=5, seeds=block, microbatch=6).x
    assert np.array_equal(png(tmp_path / f"samples/{last}.png"), Quantized().to_levels(x)[-1, 0].numpy())


def test_folders_of_a_thousand(there, tmp_path, monkeypatch):
    """Once there are many; what the first run decided holds for those that go on."""
    monkeypatch.setattr(generate, "MANY", 10)
    run(there / "model", tmp_path / "a", "998-1001,0-6")
    names = [f"samples/{i // 1000 * 1000:08d}/{i:08d}.png" for i in (*range(7), *range(998, 1002))]
    assert [row["file"] for row in rows(tmp_path / "a")] == names
    assert all((tmp_path / "a" / name).is_file() for name in names)
    assert not list((tmp_path / "a" / "samples").glob("*.png"))
    run(there / "model", tmp_path / "b", "0-6")
    run(there / "model", tmp_path / "b", "0-10")
    assert tree(tmp_path / "b") == tree(there / "whole")
    run(there / "model", tmp_path / "a", "0-2", overwrite=True, subdirs=False)
    assert sorted(p.name for p in (tmp_path / "a" / "samples").iterdir()) == [f"{i:08d}.png" for i in range(3)]


# --- killed --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["png", pytest.param("npz", marks=pytest.mark.slow)])
def test_killed_in_the_midst_of_it(format, tmp_path):
    """SIGKILL at the real command in two processes, then the rest in one: as if nothing had been, and nothing left over."""
    checkpoint.save(tmp_path / "model", model())
    words = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--nfe", "5", "--batch", "4", "--format", format]
    running = subprocess.Popen(
        [sys.executable, "-m", "scoresde", *words, "--seeds", "0-9999", "--processes", "2"], cwd=ROOT, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    path, until = tmp_path / "out" / "samples.csv", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 6) and time.monotonic() < until and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)  # its workers, too, wherever they are
    said, _ = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL, said
    assert not (tmp_path / "out" / "summary.json").exists()
    (tmp_path / "out" / ".writing" / "samples-00000000-00000003.npz.17").write_bytes(b"torn")  # as a worker killed leaves it
    seeds = [int(line.split(",")[0]) for line in path.read_text().splitlines()[1:] if line.count(",") == 9]
    last = max(seeds) + 13
    run(tmp_path / "model", tmp_path / "out", f"0-{last}", format=format)
    computed = json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["computed"]
    assert 0 < computed <= last + 1 - len(seeds)
    run(tmp_path / "model", tmp_path / "one", f"0-{last}", format=format)
    found, wanted = tree(tmp_path / "out"), tree(tmp_path / "one")
    written_without_a_row = {name for name in found.keys() - wanted.keys() if int(Path(name).stem.split("-")[-1]) > last}
    assert {name: data for name, data in found.items() if name not in written_without_a_row} == wanted
    assert not list((tmp_path / "out").rglob(".*"))


def test_two_processes(there, tmp_path):
    run(there / "model", tmp_path, processes=2)
    assert tree(tmp_path) == tree(there / "whole")
    assert summary(tmp_path) == summary(there / "whole")


def spied(monkeypatch):
    blocks, real = [], generate.draw
    monkeypatch.setattr(generate, "draw", lambda *a: blocks.append(a[4:6]) or real(*a))
    return blocks


@pytest.mark.parametrize("keep", [0, 10, 55, 80, 120, 200, -30, -1, None], ids=str)
def test_a_torn_table_goes_on_where_it_was(keep, there, tmp_path, monkeypatch):
    run(there / "model", tmp_path)
    table = tmp_path / "samples.csv"
    data = table.read_bytes()
    table.write_bytes(data[:keep])
    (tmp_path / "summary.json").unlink()
    blocks, kept = spied(monkeypatch), max(0, data[:keep].count(b"\n") - 1)
    run(there / "model", tmp_path)
    assert tree(tmp_path) == tree(there / "whole")
    assert [seed for _, wanted in blocks for seed in wanted] == list(range(kept, 11))


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_file_that_is_gone_is_made_again(format, there, tmp_path, monkeypatch):
    whole = there / "whole" if format == "png" else tmp_path / "whole"
    run(there / "model", whole, format=format)
    out = tmp_path / "out"
    run(there / "model", out, format=format)
    gone = "samples/00000005.png" if format == "png" else "samples-00000004-00000007.npz"
    (out / gone).unlink()
    blocks = spied(monkeypatch)
    run(there / "model", out, "5", format=format)  # and in an npz file the others of its table, too
    run(there / "model", out, format=format)
    assert blocks == [(4, [5])]
    assert tree(out) == tree(whole)


def test_interrupted(there, tmp_path, monkeypatch):
    real = generate.draw

    def interrupt(*arguments):
        if arguments[4] == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(there / "model", tmp_path)
    assert [int(row["seed"]) for row in rows(tmp_path)] == list(range(8))
    assert not (tmp_path / "summary.json").exists()
    run(there / "model", tmp_path)
    assert tree(tmp_path) == tree(there / "whole")


def test_a_full_disk(there, tmp_path, monkeypatch):
    """Says which seeds were under way; the rows that there are have their files; with room again it goes on."""
    real, writes = generate.write_file, itertools.count()

    def full(path, data, aside):
        if next(writes) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, aside)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_file", full)
        with pytest.raises(RuntimeError, match=r"seeds 4 \.\. 7: OSError: .*No space left"):
            run(there / "model", tmp_path)
    assert [int(row["seed"]) for row in rows(tmp_path)] == list(range(4))
    assert not (tmp_path / "summary.json").exists()
    run(there / "model", tmp_path)
    assert tree(tmp_path) == tree(there / "whole")


def test_a_worker_that_was_killed(there, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "draw", lambda *_: (_ for _ in ()).throw(BrokenProcessPool("died")))
    with pytest.raises(RuntimeError, match="fewer --processes or a smaller --batch"):
        run(there / "model", tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_the_summary_is_last(there, tmp_path, monkeypatch):
    real = resume.write_json

    def checked(path, value, aside):
        if path.name == "summary.json":
            assert tree(tmp_path, ("summary.json", pages.RUN)) == tree(there / "whole")
            raise OSError("as if killed here")
        real(path, value, aside)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_json", checked)
        with pytest.raises(OSError, match="as if killed"):
            run(there / "model", tmp_path)
    run(there / "model", tmp_path)
    run_again = summary(tmp_path)
    run(there / "model", tmp_path, "0-11")  # one that grows has none until it is whole
    assert summary(tmp_path)["n"] == run_again["n"] + 1
    with monkeypatch.context() as patch:
        patch.setattr(generate, "draw", lambda *_: (_ for _ in ()).throw(OSError("x")))
        with pytest.raises(RuntimeError, match="seeds 12"):
            run(there / "model", tmp_path, "0-12")
    assert not (tmp_path / "summary.json").exists()


def test_samples_that_are_not_finite(tmp_path):
    """Named when all others are written; they have a row that says so, and no file."""
    denoiser = model(classes=3)
    with torch.no_grad():
        denoiser.net.condition.labels.weight[2] = torch.nan  # of class 1
    checkpoint.save(tmp_path / "model", denoiser)
    for _ in range(2):  # a function of the seed: the same again
        with pytest.raises(NonFiniteError, match=r"4 of 11 seeds are not finite and were not written: 1, 4, 7, 10 \(status 1:"):
            run(tmp_path / "model", tmp_path / "out", labels="cycle")
        assert [int(row["seed"]) for row in rows(tmp_path / "out") if row["status"] == "0"] == [0, 2, 3, 5, 6, 8, 9]
        assert {row["file"] for row in rows(tmp_path / "out") if row["status"] != "0"} == {""}
        assert len(list((tmp_path / "out" / "samples").iterdir())) == 7
        assert not (tmp_path / "out" / "summary.json").exists()
    assert run(tmp_path / "model", tmp_path / "out", "0,2-3,5", labels="cycle")["n"] == 4  # its mates are none of its concern
    with pytest.raises(NonFiniteError, match="1 of 1"):
        run(tmp_path / "model", tmp_path / "shard", "1", labels="cycle", format="npz")
    assert not list((tmp_path / "shard").glob("*.npz"))


# --- processes of a group ------------------------------------------------------------------------------------------------
def sampled(group, folder, out, cases):
    """What each process of a group says and returns, for each (name, seeds, settings); without flushing, for speed."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        for name, seeds, more in cases:
            said, more = [], dict(more)
            overwrite = more.pop("overwrite", False)
            got = generate.run(folder, out / name, settings(seeds, **more), overwrite=overwrite, say=said.append, group=group)
            found.append((len(said), {key: value for key, value in got.items() if key != "run"}))
    return found


def paged(group, page, work, *args):
    """work(group, *args) with pages of about so many seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "PAGE", page)
        return work(group, *args)


def alike(worlds, folder, tmp_path, cases):
    """The same files and the same words from the first alone, for any number of processes, as from one."""
    alone = sampled(Group(), folder, tmp_path / "1", cases)
    for world, ranks in worlds.items():
        found = ranks(sampled, folder, tmp_path / str(world), cases)
        assert [[(said, got) for said, got in each] for each in found[:1]] == [alone]
        for each in found[1:]:
            assert [(said, got) for said, got in each] == [(0, got) for _, got in alone]
        for name, seeds, _ in cases:
            assert tree(tmp_path / str(world) / name) == tree(tmp_path / "1" / name), (world, name)
            assert not list((tmp_path / str(world) / name).rglob(".*"))
            run = json.loads((tmp_path / str(world) / name / "summary.json").read_text())["run"]
            assert (run["world"], run["computed"]) == (world, parse_seeds(seeds).count)


def test_the_same_files_for_any_number_of_processes(there, two, three, tmp_path):
    """n that divides or not, batches that divide or not, seeds with gaps, files of both kinds, solvers with mates and noise, float64."""
    cases = [(f"n {n}", f"0-{n - 1}", {"format": "npz"} if n % 2 else {}) for n in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17)]
    cases += [("gaps", "0,5,7-9", {"batch": 5}), ("one", "3", {"batch": 64}), ("each", "0-5", {"batch": 1})]
    cases += [("double", "0-6", {"dtype": "float64"}), ("subdirs", "998-1003", {"subdirs": True})]
    cases += [
        ("adaptive", "1,3-9", {"solver": "Dopri5:rtol=0.1:atol=0.1", "nfe": None}),
        ("noise", "1,3-9", {"solver": "SDEDPMSolverPP:2"}),
    ]
    cases += [("last", f"{2**64 - 3}-{2**64 - 1}", {"batch": 6, "format": "npz"})]
    alike({2: two, 3: three}, there / "model", tmp_path, cases)


def test_labels_of_any_number_of_processes(two, tmp_path):
    checkpoint.save(tmp_path / "model", model(classes=3))
    alike(
        {2: two},
        tmp_path / "model",
        tmp_path,
        [("cycle", "0-8", {"labels": "cycle"}), ("one", "0-8", {"labels": 2, "format": "npz"})],
    )


@pytest.mark.parametrize("format", ["png", "npz"])
def test_pages(format, there, two, three, tmp_path):
    """The files of several pages, of one and of many processes, in one go or extended; and the samples they are of."""
    whole = paged(Group(), 10, sampled, there / "model", tmp_path, [("1", "0-40,95-99", {"format": format})])
    assert (whole[0][1]["n"], whole[0][1]["seeds"]) == (46, "0-40,95-99")
    names = [f"samples{start}.csv" for start in ("", *(f"-{first:012d}" for first in (12, 24, 36, 84, 96)))]
    assert sorted(p.name for p in (tmp_path / "1").glob("*.csv")) == sorted(names)
    assert (tmp_path / "1" / "pages.jsonl").read_bytes().count(b"\n") == 6
    assert [int(row["seed"]) for name in names for row in rows(tmp_path / "1", name)] == [*range(41), *range(95, 100)]
    for name, ranks, cases in (("2", two, ["0-40,95-99"]), ("3", three, ["30,96", "0-20", "0-40,95-99", "0-40,95-99"])):
        for seeds in cases:
            found = ranks(paged, 10, sampled, there / "model", tmp_path, [(name, seeds, {"format": format})])
        assert found[0][0][1] == whole[0][1]
        assert tree(tmp_path / name) == tree(tmp_path / "1")
    samples = paged(tmp_path / "3", 10, samples_of)
    x = Quantized().to_levels(direct(model(), [*range(41), *range(95, 100)])).numpy()
    assert (samples.count, samples.shape, samples.levels, samples.low, samples.high) == (46, SHAPE, 256, -1, 1)
    assert samples.sha256 == whole[0][1]["sha256"]
    for first, stop in ((0, 46), (0, 1), (38, 43), (45, 46)):
        assert np.array_equal(samples.read(first, stop), x[first:stop])


def test_overwritten_and_refused_by_all(there, two, tmp_path):
    run(there / "model", tmp_path / "out")
    with pytest.raises(Failed) as caught:
        two(sampled, there / "model", tmp_path, [("out", "0-10", {"nfe": 6})])
    assert caught.value.errors[0][0] is FileExistsError
    assert caught.value.errors[1] == (Elsewhere, "1")
    with pytest.raises(Failed) as caught, resume.locked(tmp_path / "out"):
        two(sampled, there / "model", tmp_path, [("out", "0-12", {})])
    assert "another run is at work" in caught.value.errors[0][1]
    assert caught.value.errors[1] == (Elsewhere, "1")
    two(sampled, there / "model", tmp_path, [("out", "0-10", {"nfe": 6, "overwrite": True}), ("out", "0-10", {"overwrite": True})])
    assert tree(tmp_path / "out") == tree(there / "whole")


def differs(group, folder, out):
    generate.run(folder / ("other" if group.rank else "model"), out, settings(), group=group)


def test_processes_with_other_models_are_refused(there, two, tmp_path):
    checkpoint.save(tmp_path / "model", model())
    checkpoint.save(tmp_path / "other", model(seed=1))
    with pytest.raises(Failed, match="the processes differ in the model") as caught:
        two(differs, tmp_path, tmp_path / "out")
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]
    assert not (tmp_path / "out").exists()


def fails_at(group, folder, out, block, format):
    real = generate.draw

    def draw(*arguments):
        if arguments[4] == block:
            raise ArithmeticError("this is why")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "draw", draw)
        return sampled(group, folder, out, [("out", "0-40", {"format": format})])


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_batch_that_fails_ends_all(format, there, two, tmp_path):
    """With its words from who had it; what is done is kept, and done by whoever goes on."""
    with pytest.raises(Failed) as caught:
        two(fails_at, there / "model", tmp_path, 20, format)
    errors = sorted(caught.value.errors, key=lambda error: error[0] is Elsewhere)
    assert errors[0] == (RuntimeError, "seeds 20 .. 23: ArithmeticError: this is why")
    assert errors[1] == (Elsewhere, "1")
    assert not (tmp_path / "out" / "summary.json").exists()
    with pytest.raises(ValueError, match=r"has no summary\.json, so its samples are not all there"):
        samples_of(tmp_path / "out")
    run(there / "model", tmp_path / "out", "0-40", format=format)
    assert 0 < json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["computed"] <= 41 - 12
    run(there / "model", tmp_path / "one", "0-40", format=format)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_what_is_not_finite_is_said_by_one(two, tmp_path):
    denoiser = model(classes=3)
    with torch.no_grad():
        denoiser.net.condition.labels.weight[2] = torch.nan  # of class 1
    checkpoint.save(tmp_path / "model", denoiser)
    for page in (50_000, 10):
        case = lambda name, page=page: [(f"{name} {page}", "0-20", {"labels": "cycle"})]
        with pytest.raises(
            Failed, match=r"7 of 21 seeds are not finite and were not written: 1, 4, 7, 10, .* \(status 1:"
        ) as caught:
            two(paged, page, sampled, tmp_path / "model", tmp_path, case("two"))
        assert [error for error, _ in caught.value.errors] == [NonFiniteError, Elsewhere]
        with pytest.raises(NonFiniteError, match="7 of 21"):
            paged(Group(), page, sampled, tmp_path / "model", tmp_path, case("alone"))
        assert tree(tmp_path / f"two {page}") == tree(tmp_path / f"alone {page}")


KILLED = """
import os, random, signal, sys
from scoresde import cli, filling, pages
seed, page, *words = sys.argv[1:]
if __name__ == "__main__":
    pages.PAGE, start, rank, real = int(page), int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"]), filling.Filling.add
    chance = random.Random(f"{seed} {start}")
    who, when, early, done = chance.randrange(2), chance.randrange(1, 10), chance.random() < 0.5, []
    def add(*arguments):
        done.append(1)
        if early:
            kill()
        real(*arguments)
        kill()
    def kill():
        if start < 2 and rank == who and len(done) == when:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    filling.Filling.add = add
    sys.exit(cli.main(words))
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_torchrun_starts_the_killed_again(seed, there, tmp_path):
    """A rank killed at random, twice, each time all are started again: the files are those of an undisturbed run."""
    format, page, last = ("png", "npz")[seed % 2], (50_000, 60)[seed // 2 % 2], 299
    (tmp_path / "job.py").write_text(KILLED)
    words = [
        "sample",
        there / "model",
        "--out",
        tmp_path / "out",
        "--seeds",
        f"0-{last}",
        "--nfe",
        5,
        "--batch",
        4,
        "--format",
        format,
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    more = ["--processes", 2] if seed % 5 == 4 else []
    done = subprocess.run(
        [*torchrun, *map(str, (tmp_path / "job.py", seed, page, *words, *more))], cwd=ROOT, start_new_session=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SCORESDE_TIMEOUT": "60"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("killed\n") == 2, done.stdout
    whole = paged(Group(), page, sampled, there / "model", tmp_path, [("whole", f"0-{last}", {"format": format})])
    assert summary(tmp_path / "out") == whole[0][1]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not list((tmp_path / "out").rglob(".*"))


# --- read again ----------------------------------------------------------------------------------------------------------
def test_samples_of_a_folder(there, tmp_path):
    samples = samples_of(there / "whole")
    x = direct(model(), range(11))
    assert (samples.count, samples.shape, samples.levels) == (11, SHAPE, 256)
    assert np.array_equal(samples.read(0, 11), Quantized().to_levels(x).numpy())
    assert samples.read(10, 11).dtype == np.uint8
    for first, stop in ((0, 12), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match=rf"samples {first} \.\. {stop - 1} are asked for; .* has 0 \.\. 10"):
            samples.read(first, stop)
    run(there / "model", tmp_path / "floats", "1,3-6", levels=None, subdirs=None)
    floats = samples_of(tmp_path / "floats")
    assert (floats.count, floats.levels, floats.low, floats.high) == (5, None, None, None)
    assert np.array_equal(floats.read(1, 5), x[3:7].numpy())
    run(there / "model", tmp_path / "folders", "998-1002", subdirs=True)
    assert samples_of(tmp_path / "folders").read(0, 5).shape == (5, *SHAPE)


def test_a_folder_that_is_not_whole_is_refused(there, tmp_path):
    for name in ("none", "settings.json", "samples.csv", "samples/00000003.png", "summary.json"):
        out = tmp_path / name.replace("/", "_")
        run(there / "model", out)
        if name != "none":
            (out / name).unlink()
        if name == "summary.json":
            with pytest.raises(ValueError, match=r"no summary\.json, so its samples are not all there.*run again"):
                samples_of(out)
        elif name == "samples.csv":
            with pytest.raises(ValueError, match=r"not the rows of samples that its summary\.json speaks of"):
                samples_of(out)
        elif name == "samples/00000003.png":
            samples_of(out).read(4, 11)
            with pytest.raises(ValueError, match="00000003"):
                samples_of(out).read(3, 4)
        else:
            assert samples_of(out).count == 11
    table = tmp_path / "none" / "samples.csv"
    good = table.read_bytes()
    more = good.splitlines(True)[1].replace(b"0", b"1", 1)  # seed 1 again, as it is not
    for bad in (good.replace(b"\n3,", b"\n30,"), good[:-1], good.replace(b",5,0,", b",5,1,", 1), good + more):
        table.write_bytes(bad)
        with pytest.raises(ValueError, match=r"not the rows of samples that its summary\.json speaks of"):
            samples_of(tmp_path / "none")
    (tmp_path / "none" / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="none of `scoresde sample` of this version"):
        samples_of(tmp_path / "none")


def test_the_digest_is_of_the_numbers_alone(there, tmp_path):
    run(there / "model", tmp_path, format="npz")
    assert [row["digest"] for row in rows(tmp_path)] == [row["digest"] for row in rows(there / "whole")]
    x = Quantized().to_levels(direct(model(), range(11))).numpy()
    assert [row["digest"] for row in rows(tmp_path)] == [hashlib.sha256(each.tobytes()).hexdigest()[:16] for each in x]
    assert summary(there / "whole")["sha256"] == hashlib.sha256((there / "whole" / "samples.csv").read_bytes()).hexdigest()


# --- other settings ------------------------------------------------------------------------------------------------------
def test_other_settings_are_refused_by_name(there, tmp_path):
    run(there / "model", tmp_path, "0-3")
    before = tree(tmp_path, but=())
    changes = {
        "steps was 4, is 5": {"nfe": 6}, "dtype was float32, is float64": {"dtype": "float64"}, "high was 1.0, is 2.0": {"high": 2.0},
        "batch was 4, is 5": {"batch": 5}, "levels was 256, is 17": {"levels": 17}, "format was png, is npz": {"format": "npz"},
        "solver was .* is IPNDM": {"solver": "IPNDM", "nfe": 5}, "subdirs was False, is True": {"subdirs": True},
    }  # fmt: skip
    for words, more in changes.items():
        with pytest.raises(FileExistsError, match=f"{words}.*--overwrite") as caught:
            run(there / "model", tmp_path, "0-3", **more)
        assert str(caught.value).count(" was ") == 1
    checkpoint.save(tmp_path.parent / f"{tmp_path.name} other", model(seed=1))
    with pytest.raises(FileExistsError, match="checkpoint_sha256 was"):
        run(tmp_path.parent / f"{tmp_path.name} other", tmp_path, "0-3")
    assert tree(tmp_path, but=()) == before
    run(there / "model", tmp_path, "2-3", nfe=6, overwrite=True, format="npz")
    assert sorted(tree(tmp_path, but=())) == [
        "grid.png",
        "samples-00000000-00000003.npz",
        "samples.csv",
        "settings.json",
        "summary.json",
    ]
    assert [row["nfe"] for row in rows(tmp_path)] == ["6", "6"]


def test_files_that_no_run_made_are_left_alone(there, tmp_path):
    for overwrite in (False, True):
        for name in ("samples/00000003.png", "samples/00000000/00000003.png", "samples-00000000-00000063.npz", "samples.csv"):
            out = tmp_path / name.replace("/", "_") / str(overwrite)
            (out / name).parent.mkdir(parents=True)
            (out / name).write_bytes(b"dear")
            with pytest.raises(FileExistsError, match=r"no settings\.json"):
                run(there / "model", out, "0-3", overwrite=overwrite)
            assert tree(out) == {name: b"dear"}
    (tmp_path / "out" / "samples").mkdir(parents=True)
    for name in ("photo.png", ".hidden.17", "samples/notes.txt", "samples/.note.3"):
        (tmp_path / "out" / name).write_bytes(b"dear")
    run(there / "model", tmp_path / "out", "0-3")
    run(there / "model", tmp_path / "out", "0-1", overwrite=True)
    kept = {"photo.png", ".hidden.17", "samples/notes.txt", "samples/.note.3"}
    assert {name for name, data in tree(tmp_path / "out").items() if data == b"dear"} == kept


def test_what_is_damaged_is_not_gone_on_with(there, tmp_path):
    run(there / "model", tmp_path)
    table = tmp_path / "samples.csv"
    good = table.read_bytes()
    (tmp_path / "summary.json").write_text("[]")  # which is made again
    run(there / "model", tmp_path)
    assert summary(tmp_path) == summary(there / "whole")
    for bad in (good.replace(b"seed", b"s", 1), good.replace(b"\n3,", b"\nx,"), good.replace(b",-1,5,", b",-1,"), b"\n" + good):
        table.write_bytes(bad)
        with pytest.raises(ValueError, match="is none that this version writes"):
            run(there / "model", tmp_path)
        assert table.read_bytes() == bad
    table.write_bytes(good.replace(b"\n3,samples/00000003.png", b"\n3,../../elsewhere.png"))
    run(there / "model", tmp_path)
    assert table.read_bytes() == good
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not what a run writes"):
        run(there / "model", tmp_path)


def test_two_runs_at_once_are_refused(there, tmp_path):
    with resume.locked(tmp_path), pytest.raises(RuntimeError, match="another run is at work"):
        run(there / "model", tmp_path)


# --- what is asked for ---------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=8), st.randoms())
def test_seeds_are_the_numbers_that_the_text_names(parts, random):
    words = [str(a) if n == 0 and random.random() < 0.5 else f" {a}-{a + n}" for a, n in parts]
    wanted = {k for a, n in parts for k in range(a, a + n + 1)}
    found = parse_seeds(",".join(words))
    assert list(found) == sorted(wanted)
    assert found.count == len(wanted)
    assert {k for k in range(-1, 80) if k in found} == wanted
    assert all(b.start > a.stop for a, b in itertools.pairwise(found.ranges))
    assert parse_seeds(str(found)) == found


def test_a_billion_seeds_are_one_range():
    found = parse_seeds(f"0-999999999,{2**64 - 1}")
    assert found.ranges == (range(10**9), range(2**64 - 1, 2**64))
    assert found.count == 10**9 + 1
    assert 10**9 - 1 in found
    assert 10**9 not in found
    assert str(found) == f"0-999999999,{2**64 - 1}"
    assert parse_seeds(f"0-{2**64 - 1}").count == 2**64
    assert list(itertools.islice(found, 3)) == [0, 1, 2]


BAD_SEEDS = [
    "",
    ",",
    "1,",
    "-1",
    "1-",
    "5-3",
    "1..3",
    "1 - 3",
    "0x3",
    "1.5",
    "1e3",
    "a",
    "٣",
    str(2**64),
    f"0-{2**64}",
    "9" * 5000,
    "1-2-3",
]


@pytest.mark.parametrize("text", BAD_SEEDS, ids=lambda text: text[:12])
def test_seeds_that_are_none(text):
    with pytest.raises(ValueError, match="wanted"):
        parse_seeds(text)


SOLVERS = {
    "Heun": s.Heun(), " Heun ": s.Heun(), "DPMSolverPP:order=3": s.DPMSolverPP(3), "DPMSolverPP:3:singlestep=True": s.DPMSolverPP(3, True),
    "SDEDPMSolverPP:2": s.SDEDPMSolverPP(2), "SDEDPMSolverPP:tau=0.5": s.SDEDPMSolverPP(tau=0.5), "DDIM:1": s.DDIM(1),
    "Dopri5:rtol=1e-3:atol=1e-3": s.Dopri5(1e-3, 1e-3), "Churn:Heun:40": s.Churn(s.Heun(), 40),
    "UniPC:lower_final=True": s.UniPC(lower_final=True),
    "Restart:Heun:((0.06,0.3,2,3),)": s.Restart(s.Heun(), [(0.06, 0.3, 2, 3)]), "SASolver:corrector=None": s.SASolver(),
    "PredictorCorrector:predictor=ReverseDiffusion": s.PredictorCorrector(s.ReverseDiffusion()),
}  # fmt: skip


@pytest.mark.parametrize("text", SOLVERS)
def test_a_solver_by_its_name(text):
    assert parse_solver(text) == SOLVERS[text]


BAD_SOLVERS = {
    "heun": "did you mean Heun?", "DPMSolverP": "did you mean DPMSolver", "Solver": "known are .*Heun", "": "known are", "os": "known are",
    "Heun:order=2": "wanted Heun", "DPMSolverPP:order=9": "wanted DPMSolverPP\\(order", "DPMSolverPP:x": "wanted DPMSolverPP",
    "DPMSolverPP:__import__('os')": "wanted DPMSolverPP", "DPMSolverPP:'3'": "neither a number", "Churn:Heun": "s_churn",
    "DPMSolverPP:[3]": "neither a number", "DPMSolverPP:3:order=3": "multiple values", "Churn:Solver:3": "wanted Churn",
    "DPMSolverPP:" + "(" * 500: "wanted DPMSolverPP", "Heun:": "wanted Heun", "DDIM:=1": "wanted DDIM", "DDIM:eta=1=1": "wanted DDIM",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_SOLVERS, ids=lambda text: text[:30])
def test_a_solver_that_is_none(text):
    with pytest.raises(ValueError, match=f"solver is .*{BAD_SOLVERS[text]}"):
        parse_solver(text)


def test_nothing_that_a_text_says_is_run(tmp_path):
    with pytest.raises(ValueError, match="solver is"):
        parse_solver(f"DDIM:open({str(tmp_path / 'x')!r}, 'w')")
    assert not list(tmp_path.iterdir())


BAD = {
    "several": ({"nfe": 4, "steps": 4}, "both given"),
    "nfe": ({"nfe": 0}, "nfe is 0"),
    "steps": ({"steps": 2.5, "nfe": None}, "steps is 2.5"),
    "labels": ({"labels": "cycles"}, "labels is 'cycles'; wanted a label, or cycle"),
    "label": ({"labels": -1}, "labels is -1"),
    "levels": ({"levels": 1}, "levels is 1"),
    "range": ({"low": 2.0}, "high"),
    "format": ({"format": "jpg"}, "format is 'jpg'; wanted one of png, npz"),
    "bits": ({"format": "png", "levels": 257}, "levels is 257; wanted format npz"),
    "floats": ({"format": "png", "levels": None}, "levels is None; wanted format npz"),
    "subdirs": ({"format": "npz", "subdirs": True}, "subdirs is of PNG files"),
    "batch": ({"batch": 0}, "batch is 0"),
    "dtype": ({"dtype": "float16"}, "dtype is 'float16'; wanted one of float32, float64"),
    "device": ({"device": "abacus"}, "device is 'abacus'"),
    "solver": ({"solver": "Hein"}, "did you mean Heun"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_make_no_sense(name):
    values, words = BAD[name]
    with pytest.raises((TypeError, ValueError), match=words):
        settings(**values)


def test_seeds_are_not_text_or_none():
    for seeds in ("0-3", Seeds(())):
        with pytest.raises(TypeError, match="parse_seeds"):
            Settings(seeds=seeds)


BAD_RUNS = {
    "least": ({"solver": "Heun", "nfe": 2}, "the least is nfe=3"),
    "adaptive": ({"solver": "Dopri5"}, "chooses its steps: drop nfe"),
    "steps": ({"solver": "Dopri5", "nfe": None, "steps": 3}, "chooses its steps: drop steps"),
    "processes": ({"processes": 0}, "processes is 0"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_what_does_not_fit_the_model_is_said_before_anything_is_begun(name, there, tmp_path):
    values, words = BAD_RUNS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        run(there / "model", tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_no_model_and_no_pillow(there, tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        run(tmp_path, tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"scoresde\[plots\]"):
        run(there / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(figures, "png", lambda _: (_ for _ in ()).throw(ModuleNotFoundError("PIL")))
    run(there / "model", tmp_path / "out", "0-3", format="npz")
    assert "no grid.png without Pillow" in capsys.readouterr().err
    assert (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("kwargs", "nfe"), [({}, 35), ({"solver": "Heun"}, 35), ({"steps": 6}, 7), ({"solver": "Heun", "steps": 3}, 7)]
)
def test_the_budget(kwargs, nfe, there, tmp_path):
    """35 where none is given; the default solver is the library's for that budget."""
    found = run(there / "model", tmp_path, "0-3", **{"nfe": None, **kwargs})
    assert found["nfe"] == nfe
    budget = {"steps": kwargs["steps"]} if "steps" in kwargs else {"nfe": 35}
    solver = parse_solver(kwargs["solver"]) if "solver" in kwargs else None
    x = direct(model(), range(4), solver=solver, **budget)
    assert np.array_equal(png(tmp_path / "samples" / "00000003.png"), Quantized().to_levels(x)[3, 0].numpy())


# --- the command ---------------------------------------------------------------------------------------------------------
def test_the_command(there, tmp_path, capsys):
    words = ["sample", str(there / "model"), "--out", str(tmp_path), "--batch", "4", "--seeds", "0-10"]
    assert cli.main([*words, "--nfe", "5"]) == 0
    assert f"11 samples of {list(SHAPE)}" in capsys.readouterr().out
    assert tree(tmp_path) == tree(there / "whole")
    assert cli.main([*words, "--nfe", "6"]) == 1
    assert "steps was 4, is 5" in capsys.readouterr().err
    for more, text in ((["--seeds", "9-1"], "wanted ranges that rise"), (["--solver", "Hein"], "did you mean Heun")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *more])
        assert stop.value.code == 2
        assert text in capsys.readouterr().err
    assert tree(tmp_path) == tree(there / "whole")


def test_the_command_interrupted(there, tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-m", "scoresde", "sample", str(there / "model"), "--out", str(tmp_path), "--seeds", "0-9999", "--nfe", "5",
         "--batch", "4"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are born deaf to it
    )  # fmt: skip
    path, until = tmp_path / "samples.csv", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 6) and time.monotonic() < until and running.poll() is None:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "summary.json").exists()
    assert len(rows(tmp_path)) >= 4
    assert all((tmp_path / row["file"]).is_file() for row in rows(tmp_path))


# --- what is gone, and what is another's ------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize("page", [10, 50_000])
def test_files_that_are_gone_are_made_again(page, format, there, tmp_path, monkeypatch):
    """Of a page that is recorded too, beyond so many pages when pages.jsonl is gone; an npz file with fewer seeds counts as gone."""
    monkeypatch.setattr(pages, "PAGE", page)
    drawn, real = [], generate.draw
    monkeypatch.setattr(generate, "draw", lambda *a: drawn.extend(a[5]) or real(*a))
    run(there / "model", tmp_path, "0-15", format=format)
    before = tree(tmp_path)
    name, lost = ("samples/00000005.png", [5]) if format == "png" else ("samples-00000004-00000007.npz", [4, 5, 6, 7])
    cases = [lambda path: path.unlink()]
    if format == "npz":
        with np.load(tmp_path / name) as found:
            three = {key: found[key][:3] for key in found}
        cases += [lambda path: np.savez(path, **three), lambda path: path.write_bytes(b"torn")]
    for k, spoil in enumerate(cases):
        drawn.clear()
        spoil(tmp_path / name)
        with pytest.raises(ValueError, match="run"):
            samples_of(tmp_path).read(0, 16)
        run(there / "model", tmp_path, "0-15", format=format)
        assert tree(tmp_path) == before
        assert drawn == ([7] if k == 1 else lost)
        assert samples_of(tmp_path).read(0, 16).shape == (16, *SHAPE)
    if page == 10:
        monkeypatch.setattr(pages, "LOOKED", 1)
        (tmp_path / name).unlink()
        run(there / "model", tmp_path, "0-15", format=format)
        assert not (tmp_path / name).exists()
        (tmp_path / "pages.jsonl").unlink()
        run(there / "model", tmp_path, "0-15", format=format)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_batch_of_a_run_that_is_over_writes_no_file(format, there, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PATIENCE", 1)
    arguments, real = [], generate.draw
    with monkeypatch.context() as patch:
        patch.setattr(generate, "draw", lambda *a: arguments.append(a) or real(*a))
        run(there / "model", tmp_path, "0-2", format=format)
    run(there / "model", tmp_path, "0-3", format=format)
    before = tree(tmp_path)
    with pytest.raises(RuntimeError, match="another run has begun"):
        generate.draw(*arguments[0])
    assert tree(tmp_path) == before


def test_overwrite_reaches_no_further_than_its_run(there, tmp_path):
    run(there / "model", tmp_path / "own", "0-3")
    (tmp_path / "own" / "20240131.png").write_bytes(b"of a holiday")
    run(there / "model", tmp_path / "own", "0-2", overwrite=True)
    assert (tmp_path / "own" / "20240131.png").read_bytes() == b"of a holiday"
    assert len(list((tmp_path / "own" / "samples").iterdir())) == 3
    likelihood = {"checkpoint_sha256": "", "data_sha256": "", "dequantization": "Uniform()"}
    others = {
        "likelihood": ("settings.json", json.dumps(likelihood)),
        "training": ("config.yaml", ""),
        "other": ("summary.json", "{}"),
    }
    for folder, (name, text) in others.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        (tmp_path / folder / "grid.png").write_text("")
        before = tree(tmp_path / folder, ())
        for overwrite in (False, True):
            with pytest.raises(
                FileExistsError, match="holds a run of another command, and nothing of it was touched; choose another"
            ):
                run(there / "model", tmp_path / folder, "0-3", overwrite=overwrite)
        assert tree(tmp_path / folder, ()) == before


def test_files_where_folders_must_be(there, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="it is a file, or below one; wanted a folder"):
            run(there / "model", out, "0-1")
    for name in (pages.ROWS, resume.WRITING):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
        with pytest.raises(FileExistsError, match="is a file, where a run has a folder of what is under way; move it away"):
            run(there / "model", tmp_path / name, "0-1")
