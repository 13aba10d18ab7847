"""`scoresde likelihood`: the same numbers however the work is cut up, nothing lost by a kill, and no wrong data taken for right."""

import builtins
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import Failed

import scoresde as s
from scoresde import checkpoint, cli, densities, filling, images, pages, resume
from scoresde.parallel import Elsewhere, Group

COUNT, STEPS, LEVELS = 11, 4, 17
BASE = ["--levels", str(LEVELS), "--steps", str(STEPS), "--batch", "4"]


def save(folder, shape=(1, 4, 4), seed=0, sde=None):
    net = s.MLP(shape, width=8, depth=1, emb=4, seed=seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return checkpoint.save(folder, s.Preconditioned(net, sde or s.VP()), overwrite=True)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A model, its data and the files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("likelihood")
    save(folder / "model")
    x = np.random.default_rng(0).integers(0, LEVELS, (COUNT, 1, 4, 4)).astype(np.uint8)
    np.save(folder / "x.npy", x)
    assert command(folder, folder / "whole") == 0
    return folder


def command(folder, out, *more, data="x.npy", base=BASE):
    return cli.main(["likelihood", str(folder / "model"), str(folder / data), "--out", str(out), *base, *more])


def rows(out):
    with (out / "likelihood.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def table(out):
    return (out / "likelihood.csv").read_bytes()


def summary(out):
    """All but what may differ from run to run."""
    return {name: value for name, value in json.loads((out / "summary.json").read_text()).items() if name != "run"}


def direct(folder, dtype=torch.float32, microbatch=4, **kwargs):
    """The numbers from the library itself, batch by batch."""
    model, x = checkpoint.load(folder / "model"), torch.from_numpy(np.load(folder / "x.npy"))
    kwargs = {"levels": LEVELS, "steps": STEPS, "microbatch": microbatch, "dtype": dtype, **kwargs}
    seed = kwargs.pop("seed", 0)
    seeds = lambda i: [seed * 2**32 + j for j in range(i, min(i + microbatch, COUNT))]
    return [s.bits_per_dim(model, x[i : i + microbatch], seeds=seeds(i), **kwargs) for i in range(0, COUNT, microbatch)]


# --- what is written -----------------------------------------------------------------------------------------------------
def test_the_files_of_a_run(there, capsys):
    out = there / "whole"
    found, written = summary(out), rows(out)
    assert sorted(p.name for p in out.iterdir()) == ["histogram.png", "likelihood.csv", "settings.json", "summary.json"]
    assert [int(row["index"]) for row in written] == list(range(COUNT))
    each = torch.cat([f.each for f in direct(there)])
    assert [float(row["bits_per_dim"]) for row in written] == each.tolist()  # as written, so read: to the bit
    assert [float(row["log_prob"]) for row in written] == torch.cat([f.log_prob for f in direct(there)]).double().tolist()
    assert {row["stderr"] for row in written} == {row["file"] for row in written} == {""}
    assert found["bits_per_dim"] == pytest.approx(float(each.mean()), rel=1e-14)
    assert found["stderr"] == pytest.approx(float(each.std() / COUNT**0.5), rel=1e-12)
    one = direct(there)[0]
    assert (found["nfe"], found["log_det"], found["t_min"]) == (one.nfe, one.log_det, one.t_min)
    assert (found["dequantization"], found["divergence"], found["stderr_noise"]) == (one.dequantization, one.divergence, None)
    assert {name: found["ledger"][name] for name in ("score", "network", "divergence")} == {
        name: one.ledger[name] for name in ("score", "network", "divergence")
    }
    assert found["checkpoint_sha256"] == json.loads((there / "model" / "config.json").read_text())["sha256"]
    assert found["sde"]["name"] == "VP"
    assert found["solver"] == "DPMSolverPP(order=2)"
    assert (found["n"], found["first"], found["count"], found["steps"], found["batch"]) == (COUNT, 0, COUNT, STEPS, 4)
    assert found["versions"]["torch"] == torch.__version__
    assert found["low"] == -1
    assert (out / "histogram.png").read_bytes().startswith(b"\x89PNG")
    command(there, out)
    said = capsys.readouterr()
    assert "nothing to compute" in said.out
    assert f"{found['bits_per_dim']:.4f} ± {found['stderr']:.4f} bits/dim" in said.out
    assert said.err == ""


OPTIONS = {
    "importance": (["--importance", "3"], {"dequantization": s.Importance(3)}),
    "truncated normal": (["--dequantization", "truncated-normal"], {"dequantization": s.TruncatedNormal()}),
    "both, and samples": (
        ["--dequantization", "truncated-normal", "--importance", "2", "--samples", "2"],
        {"dequantization": s.Importance(2, s.TruncatedNormal()), "samples": 2},
    ),
    "samples": (["--samples", "3"], {"samples": 3}),
    "probes": (["--divergence", "rademacher:3", "--samples", "2"], {"divergence": s.divergence.rademacher(3), "samples": 2}),
    "chains": (["--divergence", "coloured:2:1"], {"divergence": s.divergence.coloured(2, 1)}),
    "seed": (["--seed", "7"], {"seed": 7}),
    "range": (["--low", "0", "--high", "2.5"], {"low": 0.0, "high": 2.5}),
    "float64": (["--dtype", "float64"], {"dtype": torch.float64}),
    "batch": (["--batch", "8"], {"microbatch": 8}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_library(name, there, tmp_path):
    """Draw by draw, with the spread of each image's draws: the numbers of one call with samples=, its noise among them."""
    more, kwargs = OPTIONS[name]
    assert command(there, tmp_path, *more) == 0
    wanted, written = direct(there, **kwargs), rows(tmp_path)
    assert [float(row["bits_per_dim"]) for row in written] == torch.cat([f.each for f in wanted]).tolist()
    log_prob = torch.tensor([float(row["log_prob"]) for row in written], dtype=torch.float64)
    torch.testing.assert_close(log_prob, torch.cat([f.log_prob for f in wanted]).double(), rtol=1e-12, atol=0)
    assert int(written[0]["nfe"]) == wanted[0].nfe
    found = summary(tmp_path)
    assert (found["divergence"], found["dequantization"]) == (wanted[0].divergence, wanted[0].dequantization)
    if kwargs.get("samples", 1) > 1:
        noise = sum((len(f.each) * f.stderr_noise) ** 2 for f in wanted) ** 0.5 / COUNT
        assert found["stderr_noise"] == pytest.approx(noise, rel=1e-12)
        assert len({row["stderr"] for row in written}) == COUNT


@pytest.mark.parametrize(
    ("more", "solver", "steps"),
    [
        (["--nfe", "30"], "DPMSolverPP(order=3)", None),
        (["--tolerance", "1e-2"], "Dopri5(rtol=0.01, atol=0.01)", None),
        (["--divergence", "gaussian:1"], "DPMSolverPP(order=3)", 64),
    ],
)  # fmt: skip
def test_a_budget_a_tolerance_or_none(more, solver, steps, there, tmp_path):
    assert command(there, tmp_path, *more, "--count", "2", base=BASE[:2]) == 0
    found = summary(tmp_path)
    assert found["solver"] == solver
    assert steps in (None, found["steps"])
    assert found["batch"] == COUNT  # no more than there are
    assert (found["ledger"]["rejected"] > 0 or found["nfe"] > 6) if "Dopri5" in solver else found["nfe"] >= 28


# --- cut up --------------------------------------------------------------------------------------------------------------
def torn(out, keep):
    """As a kill leaves a run: so many bytes of the table, and nothing that says it is whole."""
    data = table(out)
    (out / "likelihood.csv").write_bytes(data[:keep])
    for name in ("summary.json", "histogram.png"):
        (out / name).unlink()
    return data


@pytest.mark.parametrize("keep", [0, 10, 83, 150, 300, -20, -1, None], ids=str)
def test_a_killed_run_goes_on_where_it_was(keep, there, tmp_path, monkeypatch):
    assert command(there, tmp_path) == 0
    data = torn(tmp_path, keep)
    kept = max(0, data[:keep].count(b"\n") - 1)
    batches, real = [], densities.score
    monkeypatch.setattr(densities, "score", lambda *a: batches.append(a[-1]) or real(*a))
    assert command(there, tmp_path) == 0
    assert table(tmp_path) == table(there / "whole")
    assert summary(tmp_path) == summary(there / "whole")
    assert (tmp_path / "histogram.png").read_bytes() == (there / "whole" / "histogram.png").read_bytes()
    assert batches == [b for b in (0, 4, 8) if b + 4 > kept and kept < COUNT]
    assert json.loads((tmp_path / "summary.json").read_text())["run"]["computed"] == COUNT - kept


def test_a_part_has_the_numbers_of_the_whole_and_can_be_extended(there, tmp_path, capsys):
    whole = {row["index"]: row for row in rows(there / "whole")}
    assert command(there, tmp_path, "--first", "5", "--count", "2") == 0
    assert [row["index"] for row in rows(tmp_path)] == ["5", "6"]
    assert all(whole[row["index"]] == row for row in rows(tmp_path))
    assert (summary(tmp_path)["first"], summary(tmp_path)["n"]) == (5, 2)
    assert command(there, tmp_path, "--count", "1") == 0  # of another part, and of one image there is no spread
    assert summary(tmp_path)["stderr"] is None
    assert [row["index"] for row in rows(tmp_path)] == ["0", "5", "6"]
    assert command(there, tmp_path) == 0
    assert table(tmp_path) == table(there / "whole")
    assert summary(tmp_path) == summary(there / "whole")
    capsys.readouterr()
    assert command(there, tmp_path, "--first", "5", "--count", "2") == 0  # all there, but the summary is of more
    assert "nothing to compute" not in capsys.readouterr().out
    assert (summary(tmp_path)["n"], len(rows(tmp_path))) == (2, COUNT)


def test_processes_and_an_interrupt_change_no_bit(tmp_path):
    """The real command in two processes, Ctrl-C in the midst of it, then some more in two processes; beside it the same in one."""
    save(tmp_path / "model")
    np.save(tmp_path / "x.npy", np.random.default_rng(1).integers(0, LEVELS, (2001, 4, 4)).astype(np.int32))
    base = ["--levels", "17", "--steps", "10", "--batch", "2"]
    words = ["likelihood", str(tmp_path / "model"), str(tmp_path / "x.npy"), "--out", str(tmp_path / "out"), *base]
    running = subprocess.Popen(
        [sys.executable, "-m", "scoresde", *words, "--processes", "2"], cwd=Path(s.__file__).parent.parent, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are born deaf to it
    )  # fmt: skip
    path, until = tmp_path / "out" / "likelihood.csv", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 2) and time.monotonic() < until and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)  # its end is that of all who hold the pipe: no worker is left
    assert running.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in err
    there = max(int(row["index"]) for row in rows(tmp_path / "out")) + 1
    assert 0 < there < 2001
    assert not (tmp_path / "out" / "summary.json").exists()
    count = str(there + 9)
    assert cli.main([*words, "--processes", "2", "--count", count]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["run"]["processes"] == 2
    assert command(tmp_path, tmp_path / "one", "--count", count, base=base) == 0
    assert table(tmp_path / "out") == table(tmp_path / "one")
    assert summary(tmp_path / "out") == summary(tmp_path / "one")


def test_interrupted_in_one_process(there, tmp_path, monkeypatch, capsys):
    real = densities.score

    def interrupt(*arguments):
        if arguments[-1] == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(densities, "score", interrupt)
        assert command(there, tmp_path) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(rows(tmp_path)) == 8
    assert not (tmp_path / "summary.json").exists()
    assert command(there, tmp_path) == 0
    assert table(tmp_path) == table(there / "whole")


@pytest.mark.parametrize("error", [s.NonFiniteError("the state is not finite"), KeyError("k"), BrokenProcessPool("died")], ids=repr)
def test_an_error_in_a_batch_keeps_the_others(error, there, tmp_path, monkeypatch, capsys):
    real = densities.score

    def fails(*arguments):
        if arguments[-1] == 4:
            raise error
        return real(*arguments)

    monkeypatch.setattr(densities, "score", fails)
    assert command(there, tmp_path) == 1
    err = capsys.readouterr().err
    assert ("fewer --processes" if isinstance(error, BrokenProcessPool) else f"images 4 .. 7: {type(error).__name__}: ") in err
    assert len(rows(tmp_path)) == 4
    assert not (tmp_path / "summary.json").exists()


# --- processes of a group ------------------------------------------------------------------------------------------------
def scored(group, folder, out, cases, page=50_000):
    """What each process of a group says and returns, for each (name, settings and range); without flushing or drawing, for speed."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(pages, "PAGE", page)
        patch.setattr(densities.figures, "likelihood", lambda path, panels: path.write_text(repr(panels)))  # drawn elsewhere
        for name, more in cases:
            said, more = [], {"levels": LEVELS, "steps": STEPS, "batch": 4, **more}
            how = {key: more.pop(key) for key in ("first", "count", "overwrite") if key in more}
            chosen = densities.Settings(**more)
            got = densities.run(folder / "model", folder / "x.npy", out / name, chosen, say=said.append, group=group, **how)
            found.append((len(said), {key: value for key, value in got.items() if key != "run"}))
    return found


def tree(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "summary.json"}


def test_the_same_files_for_any_number_of_processes(there, two, three, tmp_path):
    """Counts that divide or not, parts of the data, batches of one and of all, an adaptive solver, probes and draws, float64."""
    cases = [(f"n {n}", {"count": n}) for n in (1, 2, 3, 4, 5, 8, 9, COUNT)]
    cases += [
        ("part", {"first": 5, "count": 4}),
        ("each", {"batch": 1, "count": 3}),
        ("all", {"batch": 64}),
        ("double", {"dtype": "float64"}),
    ]
    cases += [("adaptive", {"steps": None, "tolerance": 1e-2, "first": 2}), ("draws", {"samples": 2, "importance": 2, "seed": 3})]
    cases += [("probes", {"divergence": s.divergence.rademacher(2)})]
    alone = scored(Group(), there, tmp_path / "1", cases)
    for world, ranks in {2: two, 3: three}.items():
        found = ranks(scored, there, tmp_path / str(world), cases)
        assert found[0] == alone
        assert all(each == [(0, got) for _, got in alone] for each in found[1:])
        for name, _ in cases:
            out = tmp_path / str(world) / name
            assert tree(out) == tree(tmp_path / "1" / name)
            assert not list(out.rglob(".*"))
            assert json.loads((out / "summary.json").read_text())["run"]["world"] == world


def test_pages(there, two, three, tmp_path):
    """Several pages by one and by many processes, in one go or extended; the summary is that of the same rows in one page."""
    whole = scored(Group(), there, tmp_path, [("1", {"samples": 2})], 5)[0][1]
    names = ["likelihood-000000000008.csv", "likelihood.csv"]
    assert sorted(p.name for p in (tmp_path / "1").glob("*.csv")) == names
    for name, ranks, cases in (("2", two, [{}]), ("3", three, [{"first": 9, "count": 1}, {"count": 3}, {}, {}])):
        for more in cases:
            found = ranks(scored, there, tmp_path, [(name, {"samples": 2, **more})], 5)
        assert found[0][0][1] == whole
        assert tree(tmp_path / name) == tree(tmp_path / "1")
    one = scored(Group(), there, tmp_path, [("one page", {"samples": 2})])[0][1]
    assert {**one, "sha256": 0} == {**whole, "sha256": 0}
    assert one["sha256"] == hashlib.sha256(table(tmp_path / "one page")).hexdigest()
    hashes = [hashlib.sha256((tmp_path / "1" / name).read_bytes()).hexdigest() for name in reversed(names)]
    assert whole["sha256"] == hashlib.sha256("".join(f"{each}\n" for each in hashes).encode()).hexdigest()


def other(group, folder, out):
    data = folder / ("x.npy" if group.rank == 0 else "y.npy")
    densities.run(folder / "model", data, out, densities.Settings(levels=LEVELS, steps=STEPS), group=group)


def breaks(group, folder, out):
    real = densities.score

    def score(*arguments):
        if arguments[-1] == 8:
            raise s.NonFiniteError("the state is not finite")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(densities, "score", score)
        scored(group, folder, out, [("out", {})])


def test_what_fails_in_one_process_ends_all(there, two, tmp_path):
    np.save(there / "y.npy", np.load(there / "x.npy")[::-1])
    with pytest.raises(Failed, match="the processes differ in the data") as caught:
        two(other, there, tmp_path / "other")
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]
    assert not (tmp_path / "other").exists()
    with pytest.raises(Failed) as caught:
        two(breaks, there, tmp_path)
    errors = sorted(caught.value.errors, key=lambda error: error[0] is Elsewhere)
    assert errors == [(RuntimeError, "images 8 .. 10: NonFiniteError: the state is not finite"), (Elsewhere, "1")]
    assert not (tmp_path / "out" / "summary.json").exists()
    scored(Group(), there, tmp_path, [("out", {})])
    assert table(tmp_path / "out") == table(there / "whole")
    assert summary(tmp_path / "out") == summary(there / "whole")
    np.save(there / "z.npy", np.concatenate([np.load(there / "x.npy"), np.full((1, 1, 4, 4), LEVELS, np.uint8)]))
    with pytest.raises(Failed, match=rf"image {COUNT} spans {LEVELS} \.\. {LEVELS}") as caught:
        two(last_is_wrong, there, tmp_path / "wrong")
    assert [error for error, _ in caught.value.errors] == [Elsewhere, ValueError]


def last_is_wrong(group, folder, out):
    densities.run(folder / "model", folder / "z.npy", out, densities.Settings(levels=LEVELS, steps=STEPS), group=group)


# --- other settings ------------------------------------------------------------------------------------------------------
def test_other_settings_are_refused_by_name(there, tmp_path, capsys):
    assert command(there, tmp_path, "--count", "3") == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    changes = {
        "seed was 0, is 1": ["--seed", "1"], "steps was 4, is 5": ["--steps", "5"], "samples was 1, is 2": ["--samples", "2"],
        "dtype was float32, is float64": ["--dtype", "float64"], "high was 1.0, is 2.0": ["--high", "2"],
        "dequantization was Uniform(), is TruncatedNormal()": ["--dequantization", "truncated-normal"],
        "divergence was exact(chunk=64), is rademacher(": ["--divergence", "rademacher"], "batch was 4, is 5": ["--batch", "5"],
    }  # fmt: skip
    for words, more in changes.items():
        assert command(there, tmp_path, "--count", "3", *more) == 1
        err = capsys.readouterr().err
        assert words in err
        assert "--overwrite" in err
        assert err.count(" was ") == 1
    np.save(there / "other.npy", np.load(there / "x.npy")[::-1])
    assert command(there, tmp_path, data="other.npy") == 1
    assert "data_sha256 was" in capsys.readouterr().err
    for kwargs, words in (({"seed": 1}, "checkpoint_sha256 was"), ({"sde": s.VP(t_min=1e-2)}, "sde was")):
        save(tmp_path / "more" / "model", **kwargs)
        np.save(tmp_path / "more" / "x.npy", np.load(there / "x.npy"))
        assert command(tmp_path / "more", tmp_path) == 1
        assert words in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert command(there, tmp_path, "--overwrite", "--seed", "1") == 0
    assert (summary(tmp_path)["seed"], len(rows(tmp_path))) == (1, COUNT)
    assert rows(tmp_path)[0]["bits_per_dim"] != rows(there / "whole")[0]["bits_per_dim"]


def test_what_is_damaged_is_not_gone_on_with(there, tmp_path, capsys):
    assert command(there, tmp_path) == 0
    path = tmp_path / "likelihood.csv"
    good = path.read_bytes()
    for bad in (good.replace(b"index", b"i"), good.replace(b"\n3,,", b"\nx,,"), good.replace(b"\n3,,", b"\n3,"), b"\n" + good):
        path.write_bytes(bad)
        assert command(there, tmp_path) == 1
        assert "is none that this version writes" in capsys.readouterr().err
        assert path.read_bytes() == bad
    path.write_bytes(good)
    (tmp_path / "settings.json").write_text("{")
    assert command(there, tmp_path) == 1
    assert "settings.json is not what a run writes" in capsys.readouterr().err
    (tmp_path / "settings.json").unlink()
    assert command(there, tmp_path) == 1
    assert "no settings.json" in capsys.readouterr().err
    assert command(there, tmp_path, "--overwrite") == 0
    assert path.read_bytes() == good


def test_two_runs_at_once_are_refused(there, tmp_path, capsys):
    with resume.locked(tmp_path):
        assert command(there, tmp_path) == 1
    assert "another run is at work" in capsys.readouterr().err
    assert command(there, tmp_path) == 0


def test_a_checkpoint_written_anew_meanwhile_is_not_taken_for_the_old(there):
    text = (there / "model" / "config.json").read_text()
    with pytest.raises(ValueError, match="written anew"):
        densities.loaded(there / "model", text.replace("VP", "VE"), "cpu")


# --- images --------------------------------------------------------------------------------------------------------------
def picture(folder, name, array, mode=None, **kwargs):
    folder.mkdir(exist_ok=True)
    Image.fromarray(array, mode).save(folder / name, **kwargs) if mode is None else array.convert(mode).save(
        folder / name, **kwargs
    )


def test_a_folder_of_pictures(there, tmp_path):
    """The same images as the array, by name; other files and hidden ones do not count."""
    x = np.load(there / "x.npy")
    for i in reversed(range(COUNT)):
        picture(tmp_path / "png", f"{i:02}, a.png", x[i, 0])
    (tmp_path / "png" / "notes.txt").write_text("")
    (tmp_path / "png" / ".hidden.png").write_text("")
    (tmp_path / "png" / "folder.png").mkdir()
    save(tmp_path / "model")
    assert command(tmp_path, tmp_path / "out", data="png") == 0
    found, wanted = rows(tmp_path / "out"), rows(there / "whole")
    assert [row.pop("file") for row in found] == [f"{i:02}, a.png" for i in range(COUNT)]
    assert found == [{k: v for k, v in row.items() if k != "file"} for row in wanted]
    data = torn(tmp_path / "out", 250)
    assert command(tmp_path, tmp_path / "out", data="png") == 0
    assert table(tmp_path / "out") == data
    picture(tmp_path / "png", "00, a.png", x[1, 0])
    assert command(tmp_path, tmp_path / "out", data="png") == 1


def test_colour_and_grey_are_converted_without_loss_alone(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, shape).astype(np.uint8) for shape in ((4, 5), (4, 5, 3)))
    picture(tmp_path / "a", "0.png", grey)
    picture(tmp_path / "a", "1.png", np.stack([grey] * 3, -1))
    picture(tmp_path / "a", "2.bmp", Image.fromarray(grey), "P")
    picture(tmp_path / "a", "3.png", Image.fromarray(grey), "LA")
    one, three = images.load(tmp_path / "a", (1, 4, 5)), images.load(tmp_path / "a", (3, 4, 5))
    assert np.array_equal(one.read(0, 4), np.broadcast_to(grey, (4, 1, 4, 5)))
    assert np.array_equal(three.read(1, 4), np.broadcast_to(grey, (3, 3, 4, 5)))
    picture(tmp_path / "b", "0.png", colour)
    assert np.array_equal(images.load(tmp_path / "b", (3, 4, 5)).read(0, 1)[0], np.moveaxis(colour, -1, 0))
    with pytest.raises(ValueError, match=r"0\.png is in colour and the network has one channel"):
        images.load(tmp_path / "b", (1, 4, 5)).read(0, 1)
    clear = Image.fromarray(colour).convert("RGBA")
    clear.putpixel((1, 1), (0, 0, 0, 254))
    clear.save(tmp_path / "b" / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b" / "2.png")
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "b" / "3.tiff")
    Image.fromarray(colour).save(tmp_path / "b" / "4.gif", save_all=True, append_images=[Image.fromarray(colour[::-1].copy())])
    (tmp_path / "b" / "5.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:60])
    picture(tmp_path / "b", "6.png", grey.T.copy())
    sixteen = (tmp_path / "b" / "0.png").read_bytes().replace(b"IHDR\0\0\0\5\0\0\0\4\x08", b"IHDR\0\0\0\5\0\0\0\4\x10")
    (tmp_path / "b" / "7.png").write_bytes(sixteen)
    wanted = (
        "transparent",
        "16 bits",
        "CMYK",
        "2 frames",
        "cannot be read",
        "4 x 5; the network wants 5 x 4",
        "16 bits|cannot be read",
    )
    for i, words in enumerate(wanted, 1):
        with pytest.raises(ValueError, match=words):
            images.load(tmp_path / "b", (3, 4, 5)).read(i, i + 1)


def test_the_layouts_of_an_array(tmp_path):
    path, x = tmp_path / "x.npy", np.arange(2 * 60).reshape(2, 3, 4, 5).astype(np.uint8)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    for given, shape in ((x, (3, 4, 5)), (last, (3, 4, 5)), (x[:, 0], (1, 4, 5)), (x[:, :1], (1, 4, 5)), (x[..., 0], (3, 4))):
        np.save(path, given)
        found = images.load(path, shape)
        assert (found.count, found.read(0, 2).shape, found.read(1, 2).dtype) == (2, (2, *shape), np.uint8)
    np.save(path, last)
    assert np.array_equal(images.load(path, (3, 4, 5)).read(0, 2), x)
    for dtype in (">i4", "uint16", "int8", "uint64"):
        np.save(path, np.asfortranarray(x.astype(dtype)))
        found = images.load(path, (3, 4, 5)).read(0, 2)
        assert found.dtype == np.int64
        assert np.array_equal(found, x)
    refused = {
        r"\[2, 4, 5, 3\] int64; channels last are taken of uint8 alone: np.moveaxis": (last.astype(np.int64), (3, 4, 5)),
        r"\[2, 3, 4, 5\] uint8; wanted \[N, 3, 5, 4\]": (x, (3, 5, 4)),
        r"\[2, 4, 5\] uint8; wanted \[N, 3, 4, 5\]": (x[:, 0], (3, 4, 5)),
        r"\[\] uint8; wanted \[N, 20\]": (np.uint8(3), (20,)),
        "holds no images|cannot be read": (x[:0], (3, 4, 5)),
    }
    for words, (given, shape) in refused.items():
        np.save(path, given)
        with pytest.raises(ValueError, match=words):
            images.load(path, shape)


def test_bad_data_and_models_end_with_words(there, tmp_path, capsys, monkeypatch):
    x = np.load(there / "x.npy")
    np.save(there / "floats.npy", x / 16)
    np.save(there / "bool.npy", x > 3)
    np.save(there / "negative.npy", x.astype(np.int64) - 1)
    np.save(there / "flat.npy", x.reshape(COUNT, 16))
    np.save(there / "objects.npy", np.array([None]), allow_pickle=True)
    (there / "empty").mkdir(exist_ok=True)
    (there / "none.npy").write_bytes(b"")
    (there / "x.txt").write_text("")
    cases = {
        "floats.npy": "wanted integers", "bool.npy": "wanted integers", "flat.npy": "wanted [N, 1, 4, 4]", "x.txt": "neither a .npy",
        "empty": "holds no image files", "none.npy": "cannot be read", "objects.npy": "cannot be read", "no.npy": "does not exist",
    }  # fmt: skip
    for data, words in cases.items():
        assert command(there, tmp_path / "out", data=data) == 1
        err = capsys.readouterr().err
        assert err.startswith("scoresde: ")
        assert words in err
    assert command(there, tmp_path / "out", data="negative.npy") == 1
    assert "spans -1 .. " in capsys.readouterr().err
    assert command(there, tmp_path / "out", "--levels", "12") == 1
    assert "wanted 0 .. 11" in capsys.readouterr().err
    assert command(there, tmp_path / "out", "--first", "9", "--count", "3") == 1
    assert "images 9 .. 11 are asked for" in capsys.readouterr().err
    assert command(there / "empty", tmp_path / "out", data="../x.npy") == 1
    assert "is no checkpoint" in capsys.readouterr().err
    save(tmp_path / "flat" / "model", shape=16)
    picture(tmp_path / "flat" / "png", "0.png", x[0, 0])
    assert command(tmp_path / "flat", tmp_path / "out", data="png") == 1
    assert "the network wants [16]" in capsys.readouterr().err
    save(tmp_path / "flat" / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command(tmp_path / "flat", tmp_path / "out", data="png") == 1
    assert "scoresde[plots]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # nothing is begun


WRONG = [
    ["--nfe", "5"], ["--tolerance", "1e-3"], ["--levels", "1"], ["--samples", "0"], ["--batch", "x"], ["--first", "-1"],
    ["--divergence", "rademacher:x"], ["--divergence", "rademacher:0"], ["--divergence", "exact:1:2"], ["--divergence", "Divergence"],
    ["--low", "1"], ["--seed", str(2**32)], ["--dequantization", "x"], ["--device", "abacus"], ["--dtype", "float16"],
]  # fmt: skip


@pytest.mark.parametrize("more", WRONG, ids=" ".join)
def test_wrong_usage(more, there, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(there, tmp_path / "out", *more)
    assert stop.value.code == 2
    assert "scoresde likelihood: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_speak_for_themselves():
    for name, value in {"dequantization": "x", "dtype": "x", "samples": 0, "tolerance": -1.0}.items():
        with pytest.raises(ValueError, match="wanted"):
            densities.Settings(**{name: value})
    with pytest.raises(ValueError, match="several of nfe, steps and tolerance"):
        densities.Settings(nfe=4, tolerance=1e-3)
    assert densities.parse_divergence("hutchpp:3:1") == s.divergence.hutchpp(3, 1)


def test_what_is_odd_is_said_once(there, tmp_path, capsys, monkeypatch):
    np.save(there / "dark.npy", np.minimum(np.load(there / "x.npy"), 2))
    monkeypatch.setattr(densities.figures, "likelihood", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError("matplotlib")))
    more = ["--steps", "2", "--importance", "2", "--divergence", "rademacher", "--levels", "256"]  # two steps are too few
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert command(there, tmp_path, *more, data="dark.npy", base=BASE[4:]) == 0
    err = capsys.readouterr().err
    for words in ("no pixel is above 2", "makes it optimistic", "no histogram.png without matplotlib"):
        assert err.count(words) == 1
    assert not (tmp_path / "histogram.png").exists()
    assert (tmp_path / "summary.json").exists()


def test_a_system_without_locks(tmp_path, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: real("no_such_module" if name == "fcntl" else name, *a, **k))
    with resume.locked(tmp_path), resume.locked(tmp_path):
        pass


# --- ends that are none -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_written(value, there, tmp_path, monkeypatch, capsys):
    real = densities.score

    def score(*arguments):
        found = real(*arguments)
        if arguments[-1] == 4:
            found[2][0] = value
        return found

    with monkeypatch.context() as patch:
        patch.setattr(densities, "score", score)
        assert command(there, tmp_path) == 1
    assert "likelihood of images 6 is not finite, and no row of their batch was written" in capsys.readouterr().err
    assert [row["index"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]
    assert command(there, tmp_path) == 0
    assert table(tmp_path) == table(there / "whole")


def test_told_to_end_it_leaves_nothing_behind(there, tmp_path, monkeypatch):
    """As SIGTERM has it, `SystemExit` anywhere: no lock is left, and the next run goes on."""

    def ends(*_):
        raise SystemExit(143)

    settings = densities.Settings(levels=LEVELS, steps=STEPS, batch=4)
    with monkeypatch.context() as patch:
        patch.setattr(densities, "score", ends)
        with pytest.raises(SystemExit):
            densities.run(there / "model", there / "x.npy", tmp_path, settings, say=lambda text: None)
    assert not (tmp_path / ".lock").exists()
    assert command(there, tmp_path) == 0
    assert table(tmp_path) == table(there / "whole")


def test_the_folder_of_samples_is_not_overwritten(there, tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"checkpoint_sha256": "", "format": "png", "subdirs": false}')
    (tmp_path / "summary.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for more in ([], ["--overwrite"]):
        assert command(there, tmp_path, *more) == 1
        assert "holds a run of another command, and nothing of it was touched" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def bars(group, folder, out):
    """What the first process's bar stands at when it closes, where it has done its part long before the others."""
    found, real, score = [], filling.tqdm, densities.score

    class Bar(real):
        def close(self):
            found.append((self.n, self.total))
            super().close()

    def late(*arguments):
        time.sleep(0.5 if group.rank else 0.0)
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "tqdm", Bar)
        patch.setattr(densities, "score", late)
        scored(group, folder, out, [("out", {})])
    return found[0]


def test_the_bar_reaches_the_end(there, two, tmp_path):
    assert two(bars, there, tmp_path)[0] == (COUNT, COUNT)
