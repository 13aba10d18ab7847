"""`scoresde evaluate`: the numbers of the metrics, the same to the bit however the work is cut up, and nothing wrong taken for right."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Failed
from test_kills import KILLED, die_at, in_child

import scoresde as s
from scoresde import checkpoint, cli, data, evaluate, metrics, reports, resume, sums
from scoresde.bits import Quantized
from scoresde.evaluate import Settings
from scoresde.metrics import Statistics
from scoresde.parallel import Elsewhere

UNIT = 3


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Units of a few images, for many of them; every unit onto the disk."""
    monkeypatch.setattr(evaluate, "UNIT", UNIT)
    monkeypatch.setattr(sums, "EVERY", 0.0)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with vectors and images, to stand in."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    np.save("a.npy", random.standard_normal((29, 5)))
    np.save("b.npy", random.standard_normal((70, 5)) + 0.3)
    np.save("c.npy", random.standard_normal((13, 5)) + 0.3)
    np.save("x.npy", random.integers(0, 256, (23, 1, 4, 4)).astype(np.uint8))
    np.save("y.npy", random.integers(0, 256, (31, 1, 4, 4)).astype(np.uint8))
    np.save("rgb.npy", random.integers(0, 256, (9, 3, 4, 4)).astype(np.uint8))
    np.save("17.npy", random.integers(0, 17, (12, 1, 4, 4)).astype(np.uint8))
    return tmp_path


def run(a, b, out, **options):
    how = {name: options.pop(name) for name in ("processes", "overwrite", "group", "say") if name in options}
    return evaluate.run(str(a), str(b), Path(out), Settings(**options), **{"say": lambda text: None, **how})


def same(found):
    """All but what may differ from run to run."""
    return {name: value for name, value in found.items() if name != "run"}


def files(out):
    """The bytes of what a run leaves, its summary apart."""
    found = {p.name: p.read_bytes() for p in Path(out).iterdir() if p.is_file() and p.name != "summary.json"}
    assert set(found) == {"settings.json", "samples.npz", "reference.npz"}
    assert {p.name for p in Path(out).iterdir()} == {*found, "summary.json"}
    return found, same(json.loads((Path(out) / "summary.json").read_text()))


def near(a, b):
    assert a == pytest.approx(b, rel=1e-12, abs=1e-12)


# --- the numbers ---------------------------------------------------------------------------------------------------------
def test_the_numbers_are_those_of_the_metrics(there, capsys):
    a, b = np.load("a.npy"), np.load("b.npy")
    found = run("a.npy", "b.npy", "out", say=print)
    near(found["fid@29"], metrics.fid(a, b))
    terms = found["fid_terms"]
    near(found["fid@29"], terms["mean"] + terms["trace_samples"] + terms["trace_reference"] - 2 * terms["cross"])
    near(terms["mean"], float(((a.mean(0) - b.mean(0)) ** 2).sum()))
    near(terms["trace_samples"], float(np.trace(np.cov(a.T))))
    first = data.permuted(np.arange(70), 70, 0, 0, stream=evaluate.APART) < 29  # as many as samples, and at least as many others
    near(found["fid_floor"]["fid"], metrics.fid(b[first], b[~first]))
    assert {k: found["fid_floor"][k] for k in ("samples", "reference")} == {"samples": 29, "reference": 41}
    assert found["samples"]["sha256"] == data.load("a.npy").sha256
    assert (found["samples"]["count"], found["reference"]["count"], found["reference"]["shape"]) == (29, 70, [5])
    assert found["features"] == {"name": "pixels", "sha256": "0" * 64, "dim": 5}
    for name, x in (("samples", a), ("reference", b)):
        with np.load(f"out/{name}.npz", allow_pickle=False) as file:
            np.testing.assert_allclose(file["mu"], x.mean(0), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(file["sigma"], np.cov(x.T), rtol=1e-12, atol=1e-14)
            assert int(file["n"]) == len(x)
    assert same(json.loads(Path("out/summary.json").read_text())) == same(found)
    said = capsys.readouterr().out
    assert said.startswith(f"fid@29 {found['fid@29']:.6g}: 29 samples, 70 of the reference; floor")
    before = {p: p.stat().st_mtime_ns for p in Path("out").iterdir() if p.is_file()}
    assert run("a.npy", "b.npy", "out", say=print) == json.loads(Path("out/summary.json").read_text())
    assert "nothing to compute" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_small_reference_has_the_floor_of_its_halves(there):
    b = np.load("b.npy")
    np.save("21.npy", np.load("a.npy")[:21])
    found = run("b.npy", "21.npy", "out")
    assert found["fid_floor"] | {"fid": 0} == {"fid": 0, "samples": 10, "reference": 11}
    np.save("3.npy", b[:3])
    assert run("b.npy", "3.npy", "out", overwrite=True)["fid_floor"] is None  # a half would have one sample
    found = run("b.npy", "a.npy", "other", count=12)
    near(found["fid@12"], metrics.fid(b[:12], np.load("a.npy")))
    assert found["fid_floor"]["samples"] == 12


def test_the_name_of_papers_from_ten_thousand_on(there, monkeypatch):
    monkeypatch.setattr(evaluate, "LITERATURE", 29)
    assert {"fid", "fid@29"} & set(run("a.npy", "b.npy", "out")) == {"fid"}
    assert {"fid", "fid@28"} & set(run("a.npy", "b.npy", "other", count=28)) == {"fid@28"}


@pytest.mark.parametrize("what", ["a.npy", "x.npy", "digits"])
def test_the_distance_to_itself_is_none(what, there, monkeypatch):
    monkeypatch.setattr(evaluate, "UNIT", 64 if what == "digits" else UNIT)
    found = run(what, what, "out")
    assert found[next(iter(found))] <= 1e-6
    assert found["fid_floor"]["fid"] > 1e-3  # other data, from the same set


def test_integers_are_compared_in_the_models_range(there, monkeypatch):
    def seen(x, levels, low=-1.0, high=1.0):
        return Quantized(levels, low, high).to_model(torch.from_numpy(x)).flatten(1)

    x, y = np.load("x.npy"), np.load("y.npy")
    near(run("x.npy", "y.npy", "1")["fid@23"], metrics.fid(seen(x, 256), seen(y, 256)))
    near(run("x.npy", "y.npy", "2", low=-2.0, high=3.0)["fid@23"], metrics.fid(seen(x, 256, -2, 3), seen(y, 256, -2, 3)))
    z = np.load("17.npy")
    near(run("17.npy", "17.npy", "3", levels=17, count=7)["fid@7"], metrics.fid(seen(z[:7], 17), seen(z, 17)))
    np.save("f.npy", seen(y, 256).reshape(-1, 1, 4, 4).numpy())  # floats are in that range already
    near(run("x.npy", "f.npy", "4")["fid@23"], metrics.fid(seen(x, 256), seen(y, 256)))
    np.save("8.npy", np.repeat(np.load("17.npy"), 4, axis=2).reshape(12, 1, 8, 8))
    monkeypatch.setattr(evaluate, "UNIT", 64)
    found = run("8.npy", "digits", "5", part="train")  # the levels of the set, which a file does not say
    near(found["fid@12"], metrics.fid(seen(np.load("8.npy"), 17), seen(data.load("digits").x[np.arange(1797)], 17)))


def features(folder, shape=(1, 4, 4), seed=0, scale=1.0):
    net = metrics.classifier(shape, 3, 6, seed=seed)
    with torch.no_grad():
        net[-3].weight.mul_(scale)
    return reports.save_features(Path(folder), "a-net", net, shape=list(shape), classes=3, features=6)


def test_features_of_a_folder(there):
    net = reports.load_features(features("net"))
    seen = lambda name: net(Quantized().to_model(torch.from_numpy(np.load(name))))
    found = run("x.npy", "y.npy", "out", features="net", batch=2)
    assert found["fid@23"] == pytest.approx(metrics.fid(seen("x.npy"), seen("y.npy")), rel=1e-4)  # a network's rounding by batch
    assert found["features"] == {"name": "a-net", "sha256": net.sha256, "dim": 6}
    near(run("x.npy", "out/reference.npz", "again", features="net", batch=2)["fid@23"], found["fid@23"])


def test_files_of_statistics(there):
    whole = run("a.npy", "b.npy", "out")
    found = run("a.npy", "out/reference.npz", "1")
    near(found["fid@29"], whole["fid@29"])
    assert (found["fid_floor"], found["reference"]["count"]) == (None, 70)
    near(run("out/samples.npz", "b.npy", "2")["fid@29"], whole["fid@29"])
    near(run("out/samples.npz", "out/reference.npz", "3")["fid@29"], whole["fid@29"])
    b = np.load("b.npy")
    np.savez("foreign.npz", mu=b.mean(0), sigma=np.cov(b.T))  # as pytorch-fid writes them
    found = run("a.npy", "foreign.npz", "4")
    near(found["fid@29"], whole["fid@29"])
    assert found["reference"]["count"] is None
    assert "fid@unknown" in run("foreign.npz", "foreign.npz", "5")


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Samples that the command has drawn, as images and as vectors."""
    folder = tmp_path_factory.mktemp("sampled")
    checkpoint.save(folder / "images", s.Preconditioned(s.MLP((1, 4, 4), width=8, depth=1, emb=4), s.VP()))
    checkpoint.save(folder / "vectors", s.Preconditioned(s.MLP(5, width=8, depth=1, emb=4), s.VP()))
    for name, more in (("images", ["--low", "-2", "--levels", "17"]), ("vectors", [])):
        assert drawn(folder / name, folder / f"{name}-out", *more) == 0
    return folder


def drawn(model, out, *more):
    """The status of the command."""
    return cli.main(["sample", str(model), *["--seeds", "3-9,20-24", "--nfe", "3", "--batch", "4", "--out"], str(out), *more])


def test_folders_of_samples(sampled, there, capsys):
    x = np.stack([np.asarray(x) for x in evaluate.opened(str(sampled / "images-out"), None, None).read(0, 12)])
    np.save("same.npy", x)
    found = run(sampled / "images-out", "17.npy", "1")  # with their levels and range
    assert (found["samples"]["seeds"], found["samples"]["levels"], found["low"], found["high"]) == ("3-9,20-24", 17, -2.0, 1.0)
    assert found["samples"]["sha256"] == json.loads((sampled / "images-out" / "summary.json").read_text())["sha256"]
    near(found["fid@12"], run("same.npy", "17.npy", "2", levels=17, low=-2.0)["fid@12"])
    vectors = run(sampled / "vectors-out", "a.npy", "3")
    assert vectors["samples"]["levels"] is None
    shutil.copytree(sampled / "images-out", "part")
    Path("part/summary.json").unlink()
    with pytest.raises(ValueError, match=r"summary\.json"):
        run("part", "17.npy", "4")
    shutil.copy(sampled / "images-out" / "summary.json", "part")
    Path("part/samples/00000007.png").unlink()
    with pytest.raises(RuntimeError, match=r"samples 3 \.\. 5: .*00000007.png"):
        run("part", "17.npy", "4")
    assert not Path("4/summary.json").exists()
    Path("training").mkdir()
    Path("training/summary.json").write_text("{}")
    for out in ("part", "training"):  # never written over
        before = {p.name for p in Path(out).iterdir()}
        with pytest.raises(FileExistsError, match="another command"):
            run("a.npy", "b.npy", out, overwrite=True)
        assert {p.name for p in Path(out).iterdir()} == before


# --- cut up --------------------------------------------------------------------------------------------------------------
def shared(group, folder, pairs):
    """In a process of a group: the summaries of many runs, one after the other."""
    evaluate.UNIT = UNIT
    os.chdir(folder)
    return [same(run(a, b, out, count=n, group=group)) for a, b, out, n in pairs]


@pytest.mark.parametrize("world", [2, 3])
def test_worlds_change_no_bit(world, there, two, three):
    wanted = {n: (run("a.npy", "c.npy", f"alone-{n}", count=n), files(f"alone-{n}")) for n in range(2, 18)}
    pairs = [("a.npy", "c.npy", f"of-{n}", n) for n in wanted]
    for found in {2: two, 3: three}[world](shared, there, pairs):
        assert found == [same(summary) for summary, _ in wanted.values()]
    for n, (_, left) in wanted.items():
        assert files(f"of-{n}") == left
        assert json.loads(Path(f"of-{n}/summary.json").read_text())["run"]["world"] == world


def test_more_processes_change_no_bit(there, monkeypatch):
    run("a.npy", "c.npy", "one")
    found = run("a.npy", "c.npy", "two", processes=2)
    assert found["run"]["processes"] == 2
    assert files("one") == files("two")


@pytest.mark.parametrize("stop", [0, 1, 7, 10, 14])
def test_an_interrupted_run_goes_on_where_it_was(stop, there, monkeypatch):
    run("a.npy", "c.npy", "whole")
    real, made = evaluate.measure, []

    def interrupt(job, k):
        if k == stop:
            raise KeyboardInterrupt
        return real(job, k)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("a.npy", "c.npy", "out")
    assert not Path("out/summary.json").exists()
    monkeypatch.setattr(evaluate, "measure", lambda job, k: made.append(k) or real(job, k))
    run("a.npy", "c.npy", "out")
    assert made == list(range(stop, 15))
    assert files("out") == files("whole")


def in_files(monkeypatch):
    """Alone, but as several do: every unit by a file."""
    real = sums.Work.__post_init__
    monkeypatch.setattr(sums.Work, "__post_init__", lambda self: (real(self), setattr(self, "_several", True))[0])


@pytest.mark.parametrize("several", [False, True])
def test_a_kill_at_any_call_loses_and_doubles_nothing(several, there, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    if several:
        in_files(monkeypatch)
    monkeypatch.setattr(evaluate, "UNIT", 9)
    run("a.npy", "c.npy", "whole")

    def work():
        die_at(n, torn=n % 2)
        run("a.npy", "c.npy", "out")

    for n in itertools.count(1, 9 if several else 7):
        code = in_child(work)
        if code == 0:
            break
        assert code == KILLED
        if n % 3 == 0 and Path("out").exists():
            shutil.rmtree("out")  # else what was killed is killed again, further on
    else:
        raise AssertionError
    assert n > 20
    run("a.npy", "c.npy", "out")
    assert files("out") == files("whole")


def test_units_that_others_have_left_are_taken(there, monkeypatch):
    """As ranks that were killed leave them: some units in files, ahead of the total."""
    run("a.npy", "c.npy", "whole")
    real, made = evaluate.measure, []
    left = (5, 6, 11, 14)

    def stop(job, k):
        if k == 3:
            for other in left:
                sums.put(Path("out/units"), other, real(job, other), job.key)
            raise KeyboardInterrupt
        return real(job, k)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run("a.npy", "c.npy", "out")
    monkeypatch.setattr(evaluate, "measure", lambda job, k: made.append(k) or real(job, k))
    run("a.npy", "c.npy", "out")
    assert made == [k for k in range(3, 15) if k not in left]
    assert files("out") == files("whole")


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "another's", "edited", "moved"])
def test_a_unit_that_was_tampered_with_is_made_anew(harm, there, monkeypatch, capsys):
    run("a.npy", "c.npy", "whole")
    in_files(monkeypatch)
    real = sums.put

    def harmed(folder, k, found, key):
        if k == 5:
            if harm == "edited":
                found["samples"].mean += 1
            real(folder, k, found, key if harm != "another's" else "x" * 32)
            path = folder / "unit-000000005.npz"
            raw = path.read_bytes()
            if harm == "edited":  # an .npz file as good as any, but for the hash of what is in it
                with np.load(path) as file:
                    arrays = dict(file)
                arrays["samples.mean"] = arrays["samples.mean"] + 1
                np.savez(path, **arrays)
            if harm == "moved":
                real(folder, 4, found, key)
                (folder / "unit-000000004.npz").rename(path)
            if harm in ("cut", "flipped", "emptied"):
                at = raw.index(b"samples.mean") + 200
                path.write_bytes(
                    {"cut": raw[:-30], "flipped": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], "emptied": b""}[harm]
                )
        else:
            real(folder, k, found, key)

    monkeypatch.setattr(sums, "put", harmed)
    run("a.npy", "c.npy", "out")
    assert "unit-000000005.npz is damaged or of another run" in capsys.readouterr().err
    assert files("out") == files("whole")


def test_a_total_that_was_tampered_with_is_made_anew(there, monkeypatch, capsys):
    run("a.npy", "c.npy", "whole")
    real = evaluate.measure
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure", lambda job, k: real(job, k) if k < 8 else 1 / 0)
        with pytest.raises(RuntimeError, match=r"samples 24 \.\. 26: ZeroDivisionError"):
            run("a.npy", "c.npy", "out")
    path = Path("out/units/total.npz")
    path.write_bytes(path.read_bytes()[:-1])
    run("a.npy", "c.npy", "out")
    assert "total.npz is damaged or of another run" in capsys.readouterr().err
    assert files("out") == files("whole")


def fails(group, folder, who):
    evaluate.UNIT = UNIT
    os.chdir(folder)
    real = evaluate.measure

    def measure(job, k):
        if group.rank == who:
            raise OSError("the disk is gone")
        time.sleep(0.02)
        return real(job, k)

    evaluate.measure = measure
    try:
        run("a.npy", "c.npy", "out", group=group)
    finally:
        evaluate.measure = real


@pytest.mark.parametrize("who", [0, 1])
def test_a_failure_ends_all_and_what_is_done_is_kept(who, there, two):
    run("a.npy", "c.npy", "whole")
    with pytest.raises(Failed) as caught:
        two(fails, there, who)
    assert caught.value.errors[who][0] is RuntimeError
    assert "OSError: the disk is gone" in caught.value.errors[who][1]
    assert caught.value.errors[1 - who] == (Elsewhere, "1")
    assert not Path("out/summary.json").exists()
    two(shared, there, [("a.npy", "c.npy", "out", None)])
    assert files("out") == files("whole")


def slow(group, folder):
    """The first process is long at its first unit; how many files wait for it at most."""
    evaluate.UNIT, seen = UNIT, [0]
    os.chdir(folder)
    real = evaluate.measure

    def measure(job, k):
        if group.rank == 0 and k < 3:
            time.sleep(0.5)
        seen.append(len(sums.left(Path("out/units"))))
        return real(job, k)

    evaluate.measure = measure
    try:
        run("a.npy", "c.npy", "out", group=group)
    finally:
        evaluate.measure = real
    return max(seen)


def test_few_files_wait(there, two):
    run("a.npy", "c.npy", "whole")
    assert max(two(slow, there)) <= 2 * sums.WINDOW
    assert files("out") == files("whole")


def test_statistics_of_parts_join_in_any_number(two, there):
    """The way of the documentation."""
    x = np.load("c.npy")
    for total in two(joined, x):
        near(total, Statistics().update(x).cov.flatten().tolist())


def joined(group, x):
    part = Statistics().update(x[group.share(len(x))])
    total = Statistics()
    for each in group.objects(part):
        total.merge(each)
    return total.cov.flatten().tolist()


# --- what is refused -----------------------------------------------------------------------------------------------------
def broken(there):
    np.savez("p.npz", mu=np.array([object()]), sigma=np.eye(2))
    np.savez("mu.npz", mu=np.zeros(5))
    np.savez("flat.npz", mu=np.zeros(5), sigma=np.zeros(5))
    np.savez("six.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez("nan.npz", mu=np.full(5, np.nan), sigma=np.eye(5))
    np.savez("text.npz", mu=np.array(["a"] * 5), sigma=np.eye(5))
    np.savez("one.npz", mu=np.zeros(5), sigma=np.eye(5), n=1)
    Path("junk.npz").write_bytes(b"PK junk")
    np.save("nan.npy", np.array([[0.0, np.nan]] * 5))
    np.save("none.npy", np.zeros((0, 5)))
    np.save("single.npy", np.zeros((1, 5)))
    np.save("wide.npy", np.zeros((4, 3, 64, 64), np.uint8))
    np.save("7.npy", np.zeros((4, 7)))
    features("net")
    features("nan", scale=float("nan"))
    features("large", (3, 8, 8))
    Path("empty").mkdir()


WRONG = {
    ("a.npy", "7.npy"): r"\[5\] and 7.npy \[7\]; wanted the same shape$",
    ("x.npy", "rgb.npy"): "one is grey and one in colour",
    ("a.npy", "x.npy"): "wanted the same shape",
    ("17.npy", "digits"): "wanted the same shape",
    ("x.npy", "digits"): "wanted 0 .. 16",
    ("nan.npy", "nan.npy"): "NaN or infinite",
    ("none.npy", "a.npy"): "no samples",
    ("single.npy", "a.npy"): "has 1 samples; wanted at least 2",
    ("a.npy", "single.npy"): "has 1 samples",
    ("none", "a.npy"): "does not exist",
    ("empty", "x.npy"): "no image files",
    ("a.npy", "p.npz"): "cannot be read",
    ("a.npy", "junk.npz"): "cannot be read",
    ("a.npy", "none.npz"): "none.npz",
    ("a.npy", "mu.npz"): "has no sigma",
    ("a.npy", "flat.npz"): r"sigma of flat.npz has shape \[5\]",
    ("a.npy", "six.npz"): r"dimensions \[5, 6\]",
    ("a.npy", "nan.npz"): "NaN or infinite",
    ("a.npy", "text.npz"): "mu is <U1",
    ("a.npy", "one.npz"): "says n is 1",
    ("wide.npy", "wide.npy"): "have 12288 numbers; wanted at most 4096",
    ("a.npy", "b.npy", "count", 30): "has 29 samples; wanted at least 30",
    ("a.npy", "b.npy", "part", "test"): "part and folder are of a named set",
    ("a.npy", "one.npz", "part", "test"): "no parts",
    ("a.npy", "b.npy", "levels", 17): "neither set is a .npy file of integers",
    ("x.npy", "y.npy", "levels", 17): "wanted 0 .. 16",
    ("a.npy", "b.npy", "features", "net"): r"features a-net of samples \[5\]: images have shape",
    ("rgb.npy", "rgb.npy", "features", "net"): r"features a-net of samples \[3, 4, 4\]",
    ("x.npy", "y.npy", "features", "large"): "features a-net of samples",
    ("x.npy", "y.npy", "features", "nan"): "returned NaN or infinite features",
    ("x.npy", "y.npy", "features", "nowhere"): "nowhere",
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: " ".join(map(str, case)))
def test_what_does_not_compare_is_refused(case, there):
    broken(there)
    a, b, *more = case
    with pytest.raises((OSError, ValueError), match=WRONG[case]):
        run(a, b, "out", **dict([more] if more else []))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch": 0}, "batch"), ({"count": 1}, "count"), ({"levels": 1}, "levels"), ({"low": 1.0}, "high"), ({"features": ""}, "features"),
     ({"device": "nowhere"}, "device is 'nowhere'"), ({"low": float("nan")}, "low")],
)  # fmt: skip
def test_settings_that_cannot_be(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Settings(**options)


def test_features_that_fail_in_the_midst(there):
    """Images that the check of the first one cannot see: the unit is named, and what is done is kept."""
    features("net")
    x = np.zeros((9, 1, 4, 4))
    x[7] = 1e300
    np.save("f.npy", x)
    with pytest.raises(RuntimeError, match=r"samples 6 \.\. 8: ValueError: a-net returned NaN or infinite features"):
        run("f.npy", "x.npy", "out", features="net")
    assert not Path("out/summary.json").exists()
    assert Path("out/units/total.npz").exists()


def test_other_settings_are_refused_by_name(there):
    run("a.npy", "b.npy", "out")
    np.save("c.npy", np.load("a.npy") + 1)
    features("net")
    for a, options, words in (("a.npy", {"batch": 5}, "batch was 64, is 5"), ("a.npy", {"count": 9}, "summed was"),
                              ("c.npy", {}, "samples_sha256 was"), ("a.npy", {"low": -2.0}, "low was -1.0, is -2.0")):  # fmt: skip
        with pytest.raises(FileExistsError, match=words) as caught:
            run(a, "b.npy", "out", **options)
        assert "--overwrite" in str(caught.value)
    found = run("c.npy", "b.npy", "out", overwrite=True)
    near(found["fid@29"], metrics.fid(np.load("c.npy"), np.load("b.npy")))
    whole = run("x.npy", "y.npy", "net-out", features="net")
    assert whole["features"]["name"] == "a-net"
    with pytest.raises(ValueError, match="the two sets do not compare: features pixels of the samples, a-net of the reference"):
        run("x.npy", "net-out/reference.npz", "other")
    run("x.npy", "y.npy", "low", low=-2.0)
    with pytest.raises(ValueError, match=r"low -1.0 of the samples, -2.0 of the reference"):
        run("x.npy", "low/reference.npz", "other")


def test_two_runs_at_once_are_refused(there):
    with resume.locked(Path("out")), pytest.raises(RuntimeError, match="another run is at work"):
        run("a.npy", "b.npy", "out")


def differs(group, folder):
    os.chdir(folder)
    return run(f"{group.rank}.npy", "b.npy", "out", group=group)


def test_ranks_that_see_other_data_are_refused(there, two):
    for rank in range(2):
        np.save(f"{rank}.npy", np.load("a.npy") + rank)
    with pytest.raises(Failed, match="the processes differ in the data"):
        two(differs, there)
    assert not Path("out/settings.json").exists()


# --- what changes, and what was tampered with ----------------------------------------------------------------------------
def alter(path):
    x = np.load(path)
    np.save("new.npy", x * 0.5 + 3)
    os.replace("new.npy", path)


@pytest.mark.parametrize("stop", [2, "end"])
def test_data_that_change_meanwhile_give_no_number(stop, there, monkeypatch):
    real = evaluate.measure
    if stop == "end":
        check = evaluate._check_unchanged
        monkeypatch.setattr(evaluate, "_check_unchanged", lambda *args: (alter("a.npy"), check(*args)))
    else:
        monkeypatch.setattr(evaluate, "measure", lambda job, k: (k == stop and alter("a.npy"), real(job, k))[1])
    with pytest.raises((RuntimeError, ValueError), match=r"a.npy has been written anew since the run began"):
        run("a.npy", "b.npy", "out")
    assert not Path("out/summary.json").exists()
    assert stop != "end" or not Path("out/units").exists()


def test_samples_that_were_replaced_or_damaged_are_named(sampled, there):
    shutil.copytree(sampled / "images-out", "s")
    shutil.copytree(sampled / "vectors-out", "v")
    path = Path("s/samples/00000005.png")
    shutil.copy("s/samples/00000006.png", path)
    with pytest.raises(RuntimeError, match=r"00000005.png has not the sample of seed 5 .*; delete 00000005.png"):
        run("s", "17.npy", "1")
    shard = next(Path("v").glob("samples-00000000*.npz" if list(Path("v").glob("samples-00000000*.npz")) else "*.npz"))
    raw = shard.read_bytes()
    for harm in (b"", b"hello", raw[: len(raw) // 2], bytes(len(raw))):
        shard.write_bytes(harm)
        with pytest.raises(
            (RuntimeError, ValueError), match=rf"{shard.name} cannot be read as samples .*; delete {shard.name}"
        ) as caught:
            run("v", "a.npy", "2")
        assert "pickle" not in str(caught.value)
    path.unlink()
    assert drawn(sampled / "images", "s", "--low", "-2", "--levels", "17") == 0
    assert run("s", "17.npy", "3")["samples"]["count"] == 12


@pytest.mark.parametrize(
    "harm",
    [{"seeds": None}, {"batch": "4"}, {"format": "bmp"}, {"levels": 16}, {"shape": 5}, {"subdirs": 3}, "[]", "", "null"],
    ids=str,
)
def test_a_damaged_summary_of_samples_is_named(harm, sampled, there):
    shutil.copytree(sampled / "images-out", "s")
    path = Path("s/summary.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **harm}) if isinstance(harm, dict) else harm)
    with pytest.raises(ValueError, match=r"summary.json is damaged, .*; delete it and run the command again"):
        run("s", "17.npy", "out")


def test_a_finished_folder_that_was_tampered_with_is_made_again(there):
    found, out = run("a.npy", "b.npy", "out"), Path("out")
    whole = files("out")
    harms = [lambda: (out / "samples.npz").unlink(), lambda: (out / "reference.npz").write_bytes(b"")]
    for other in ("", "[]", "{}", "null", json.dumps({**found, "fid@29": -5.0})):
        harms.append(lambda other=other: (out / "summary.json").write_text(other))
    for harm in harms:
        harm()
        assert same(run("a.npy", "b.npy", "out")) == same(found)
        assert files("out") == whole
    for torn in ("", "[]", "{", "5"):
        (out / "settings.json").write_text(torn)
        with pytest.raises(ValueError, match=r"settings.json is damaged.*--overwrite"):
            run("a.npy", "b.npy", "out")
        assert same(run("a.npy", "b.npy", "out", overwrite=True)) == same(found)


EYE = np.eye(5)
BAD = {
    "asym": ({"sigma": EYE + np.eye(5, k=1)}, "differs from its transpose"), "neg": ({"sigma": -EYE}, "on its diagonal"),
    "eig": ({"sigma": EYE - 0.5}, "eigenvalue"), "n": ({"n": 10.7}, "says n is 10.7"), "nan": ({"n": np.nan}, "says n is"),
    "big": ({"mu": np.full(5, 1e200)}, "beyond float64"), "facts": ({"facts": np.array('{"low": NaN}')}, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_statistics_that_cannot_be_are_refused_before_any_work(case, there):
    more, words = BAD[case]
    np.savez("bad.npz", **{"mu": np.zeros(5), "sigma": EYE, "n": 9, **more})
    with pytest.raises(ValueError, match=words):
        run("a.npy", "bad.npz", "out")
    assert not Path("out").exists()
    for kind in (np.longdouble, ">f8", np.float16):
        np.savez("good.npz", mu=np.zeros(5, kind), sigma=EYE.astype(kind), n=9)
        assert run("a.npy", "good.npz", f"out-{np.dtype(kind).str[1:]}-{np.dtype(kind).isnative}")["reference"]["count"] == 9


def test_units_past_the_last_go_and_folders_are_named(there):
    found = run("a.npy", "c.npy", "whole")
    Path("out/units").mkdir(parents=True)
    Path("out/units/unit-000000015.npz").write_bytes(b"x")
    assert same(run("a.npy", "c.npy", "out")) == same(found)
    assert files("out") == files("whole")
    Path("other/units/unit-000000002.npz").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"unit-000000002.npz is a folder"):
        run("a.npy", "c.npy", "other")
    with pytest.raises(ValueError, match="name of a set is empty"):
        run("", "c.npy", "z")


def test_a_folder_a_class_is_the_set_of_its_images(there):
    from PIL import Image

    x = np.load("x.npy")
    for i, image in enumerate(x):
        path = Path("classes") / "ab"[i > 10] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    near(run("classes", "y.npy", "1")["fid@23"], run("x.npy", "y.npy", "2")["fid@23"])
