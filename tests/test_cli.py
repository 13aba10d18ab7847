"""`scoresde train`, `sample` and `evaluate`: what they take, what they hand on, and how they end, alone and among others."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import scoresde as s
from scoresde import checkpoint, cli, command, config, evaluate, generate, run
from scoresde.command import place, warn
from scoresde.config import Choice
from scoresde.parallel import ALONE, Elsewhere, Group

TINY = """
data: {source: x.npy}
net: {name: MLP, width: 8, depth: 1, emb: 4}
steps: 3
batch: 4
ema: [{decay: 0.9}]
every: {log: 1, checkpoint: 2}
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a configuration and its data, to stand in."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).standard_normal((32, 2)).astype(np.float32))
    Path("tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """What the commands hand on, in place of the work."""
    found = []
    monkeypatch.setattr(run, "run", lambda *args, **kwargs: found.append((args, kwargs)))
    monkeypatch.setattr(generate, "run", lambda *args, **kwargs: found.append((args, kwargs)))
    monkeypatch.setattr(evaluate, "run", lambda *args, **kwargs: found.append((args, kwargs)))
    return found


def usage(capsys, *words):
    """Stderr of a command that is wrong."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    return err


# --- options -------------------------------------------------------------------------------------------------------------
OPTIONS = {
    cli.Train: {"config": "Path", "set": "tuple[tuple[str, ...], ...]", "out": "Path | None", "overwrite": "bool"},
    cli.Sample: {
        "folder": "Path", "out": "Path", "seeds": "str", "nfe": "int | None", "steps": "int | None", "solver": "str | None",
        "labels": "str | None", "weights": "str | None", "format": "Literal['png', 'npz'] | None", "subdirs": "bool | None",
        "levels": "int", "low": "float | None", "high": "float | None", "batch": "int", "processes": "int",
        "dtype": "Literal['float32', 'float64']", "device": "str", "overwrite": "bool",
    },
    cli.Evaluate: {
        "samples": "str", "reference": "str", "out": "Path", "features": "str", "part": "str | None", "count": "int | None",
        "levels": "int | None", "low": "float | None", "high": "float | None", "batch": "int", "processes": "int", "device": "str",
        "overwrite": "bool",
    },
}  # fmt: skip
KEYS = {
    "Data": "source part folder labels levels conditional flip held_out dequantize low high workers",
    "Average": "decay std", "Every": "log checkpoint keep average validate sample fid", "Samples": "count nfe columns fid features",
    "Config": "data sde net parameterization weight times spread objective optimizer steps batch accumulate clip warmup decay precision "
    "compile channels_last sharded label_dropout patience ema every samples seed device tensorboard",
}  # fmt: skip


def test_the_options_are_these():
    """They are what scripts hold on to: a change here is one of the interface."""
    for kind, wanted in OPTIONS.items():
        assert {f.name: f.type.replace('"', "'") for f in dataclasses.fields(kind)} == wanted
    for name, keys in KEYS.items():
        assert [f.name for f in dataclasses.fields(getattr(config, name))] == keys.split()
    assert {f.name for f in dataclasses.fields(generate.Settings)} <= set(OPTIONS[cli.Sample])
    assert {f.name for f in dataclasses.fields(evaluate.Settings)} <= set(OPTIONS[cli.Evaluate])


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "likelihood"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "It also runs under torchrun" in " ".join(text.split())
    kind = {"train": cli.Train, "sample": cli.Sample, "evaluate": cli.Evaluate}.get(command)
    for field in dataclasses.fields(kind)[2 if command == "evaluate" else 1 :] if kind else ():
        assert f"--{field.name} " in text
    if command == "train":
        for key in KEYS["Config"].split()[1:]:
            assert f"\n  {key}" in text
        assert "  optimizer=AdamW" in text


def test_every_command_is_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for name in ("train", "sample", "evaluate", "demo", "likelihood"):
        assert f"\n    {name}" in text
    assert "invalid choice" in usage(capsys, "trian")


# --- train ---------------------------------------------------------------------------------------------------------------
def test_what_train_hands_on(there, calls):
    assert cli.main(["train", "tiny.yaml"]) == 0
    assert (
        cli.main(["train", "tiny.yaml", "--set", "optimizer.lr=1e-4", "sde=VE", "--set", "steps=7", "--out", "a/b", "--overwrite"])
        == 0
    )
    assert cli.main(["train", "--out", "c", "--set", "clip=.inf", "--", "tiny.yaml"]) == 0
    (plain, first), (made, second), (third, _) = ((args, kwargs) for args, kwargs in calls)
    assert plain == (config.load(TINY), Path("runs/tiny"))
    assert first == {"overwrite": False, "group": ALONE}
    assert made[0] == config.load(TINY, ["optimizer.lr=1e-4", "sde=VE", "steps=7"])
    assert (made[0].sde, made[1], second) == (Choice("VE"), Path("a/b"), {"overwrite": True, "group": ALONE})
    assert (third[0].clip, third[1]) == (float("inf"), Path("c"))


WRONG = {
    "train": "PATH",
    "train none.yaml": "No such file",
    "train .": "wanted a file that ends in .yaml",
    "train tiny.yaml --set stps=1": "tiny.yaml: stps is no key; did you mean steps?",
    "train tiny.yaml --set steps=x": "steps is 'x' (str); wanted an integer",
    "train tiny.yaml --steps 3": "--steps",
    "train tiny.yaml --set clip=no": "clip is 'no'",
    "train twice.yaml": "line 2",
    "train tiny.yaml --set sde=os.system": "known are",
    "sample": "PATH",
    "sample m --seeds 5-1": "seeds are '5-1'",
    "sample m --nfe x": "--nfe",
    "sample m --nfe 3 --steps 3": "nfe and steps",
    "sample m --solver Huen": "did you mean",
    "sample m --format jpg": "--format",
    "sample m --labels two": "labels",
    "sample m --batch 0": "batch is 0",
    "sample m --low 1": "1",
    "sample m --processes 0": "processes is 0",
    "evaluate": "STR",
    "evaluate a.npy": "evaluate",
    "evaluate a.npy b.npy --count 1": "count is 1",
    "evaluate a.npy b.npy --count x": "--count",
    "evaluate a.npy b.npy --batch 0": "batch is 0",
    "evaluate a.npy b.npy --levels 1": "levels is 1",
    "evaluate a.npy b.npy --low 2": "high",
    "evaluate a.npy b.npy --processes 0": "processes is 0",
    "evaluate a.npy b.npy --device abacus": "device is 'abacus'",
    "evaluate a.npy b.npy --feature pixels": "--feature",
}


@pytest.mark.parametrize(("words", "wanted"), WRONG.items(), ids=list(WRONG))
def test_wrong_usage(words, wanted, there, calls, capsys):
    Path("twice.yaml").write_text("steps: 1\nsteps: 2\n")
    err = usage(capsys, *words.split())
    assert wanted in err
    if "For full helptext" not in err:  # which are tyro's words, in a frame
        assert err.startswith(f"scoresde {words.split()[0]}: error: ")
        assert err.count("\n") == 1
    assert calls == []


# --- sample --------------------------------------------------------------------------------------------------------------
def test_what_sample_hands_on(there, calls):
    assert cli.main(["sample", "m"]) == 0
    words = "sample m --seeds 0-4999,6000 --nfe 18 --solver DPMSolverPP:order=3 --out o --format npz --batch 32 --labels 3"
    more = "--weights ema_0.9 --processes 2 --device cpu --dtype float64 --levels 16 --low -2.5 --high 3 --overwrite"
    assert cli.main([*words.split(), *more.split()]) == 0
    assert cli.main(["sample", "m", "--labels", "cycle", "--steps", "4", "--subdirs"]) == 0
    (plain, first), (made, second), (third, _) = calls
    assert plain == (Path("m"), Path("runs/samples"), generate.Settings())
    assert first == {"processes": 1, "overwrite": False, "group": ALONE}
    wanted = generate.Settings(
        seeds=generate.parse_seeds("0-4999,6000"), nfe=18, solver="DPMSolverPP:order=3", format="npz", batch=32, labels=3,
        weights="ema_0.9", dtype="float64", levels=16, low=-2.5, high=3.0,
    )  # fmt: skip
    assert made == (Path("m"), Path("o"), wanted)
    assert second == {"processes": 2, "overwrite": True, "group": ALONE}
    assert third[2] == generate.Settings(labels="cycle", steps=4, subdirs=True)


# --- evaluate ------------------------------------------------------------------------------------------------------------
def test_what_evaluate_hands_on(there, calls):
    assert cli.main(["evaluate", "samples", "mnist"]) == 0
    words = (
        "evaluate a.npy b.npy --features net --part test --count 50 --levels 17 --low -2 --high 3 --batch 8 --processes 2 --out o"
    )
    assert cli.main([*words.split(), "--device", "cpu", "--overwrite"]) == 0
    (plain, first), (made, second) = calls
    assert plain == ("samples", "mnist", Path("runs/evaluate"), evaluate.Settings())
    assert first == {"processes": 1, "overwrite": False, "group": ALONE}
    wanted = evaluate.Settings(features="net", part="test", count=50, levels=17, low=-2.0, high=3.0, batch=8, device="cpu")
    assert made == ("a.npy", "b.npy", Path("o"), wanted)
    assert second == {"processes": 2, "overwrite": True, "group": ALONE}


def test_evaluated(there, capsys):
    """For real, twice; what fails has one line."""
    np.save("y.npy", np.load("x.npy")[::-1] + 1)
    words = ["evaluate", "x.npy", "y.npy", "--out", "e"]
    assert cli.main(words) == 0
    assert "fid@32 2" in capsys.readouterr().out  # moved by 1 on either axis
    assert cli.main(words) == 0
    assert "nothing to compute" in capsys.readouterr().out
    assert cli.main([*words, "--count", "9"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("scoresde: e holds a run with other settings: summed was")
    assert err.count("\n") == 1


# --- among others --------------------------------------------------------------------------------------------------------
@pytest.fixture
def rank(monkeypatch):
    """As torchrun starts process r of 2, without what connects them."""
    monkeypatch.setattr(cli, "LINGER", 0.0)
    monkeypatch.setattr(cli, "HEED", 0.0)
    monkeypatch.setattr(cli, "joined", lambda device: nullcontext(Group()))

    def become(r, local=0):
        for name, value in {"RANK": r, "WORLD_SIZE": 2, "LOCAL_RANK": local}.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.mark.parametrize("words", [w for w in WRONG if "abacus" not in w] + ["likelihood m x.npy --low 1", "trian", "likelihood"])
def test_the_first_says_what_is_wrong_for_all(words, there, calls, rank, capsys):
    Path("twice.yaml").write_text("steps: 1\nsteps: 2\n")
    heard = []
    for r in range(2):
        rank(r, local=r)
        with pytest.raises(SystemExit) as stop:
            cli.main(words.split())
        assert stop.value.code == 2
        heard.append(capsys.readouterr())
    assert heard[0].err
    assert heard[1] == ("", "")
    assert calls == []


def test_a_device_that_one_machine_lacks(rank, capsys):
    """The first process of that machine says so, though it is not the first of all."""
    for words in ("sample m --device abacus", "likelihood m x.npy --device abacus", "evaluate a.npy b.npy --device abacus"):
        for r, local, said in ((0, 0, "error: device is"), (2, 0, "error: rank 2: device is"), (3, 1, "")):
            rank(r, local)
            with pytest.raises(SystemExit):
                cli.main(words.split())
            err = capsys.readouterr().err
            assert said in err
            assert bool(said) == bool(err)


def test_help_is_said_once_and_the_demo_is_of_one(rank, capsys):
    for r in range(2):
        rank(r)
        for words in (["--help"], ["train", "--help"], ["likelihood", "--help"], ["demo", "--help"], ["--version"]):
            with pytest.raises(SystemExit) as stop:
                cli.main(words)
            assert stop.value.code == 0
            assert bool(capsys.readouterr().out) == (r == 0)
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo"])
        assert stop.value.code == 2
        assert capsys.readouterr().err == ("" if r else
            "scoresde demo: error: demo is of one process and torchrun has started 2; run it without torchrun\n")  # fmt: skip


def test_an_error_is_said_by_the_process_that_has_it(there, rank, monkeypatch, capsys):
    def fail(*_, **__):
        raise found

    for module in (run, generate, evaluate):
        monkeypatch.setattr(module, "run", fail)
    for words in (["train", "tiny.yaml"], ["sample", "m"], ["evaluate", "a.npy", "b.npy"]):
        rank(1)
        found = OSError("the disk is full")
        assert cli.main(words) == 1
        assert capsys.readouterr().err == "scoresde: rank 1: the disk is full\n"
        found = Elsewhere(1)
        assert cli.main(words) == 1
        found = KeyboardInterrupt()
        assert cli.main(words) == 130
        assert capsys.readouterr() == ("", "")
        rank(0)
        assert cli.main(words) == 130
        assert capsys.readouterr().err == "interrupted\n"


def test_warnings_are_said_once(rank, capsys):
    for r, said in ((0, "scoresde: a\nscoresde: rank 0: b\n"), (1, "scoresde: rank 1: b\n")):
        rank(r)
        warn("a")
        warn("b", own=True)
        assert capsys.readouterr().err == said
    assert place() == (1, 2)


def test_alone_there_is_no_rank(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    warn("a", own=True)
    assert capsys.readouterr().err == "scoresde: a\n"
    assert place() == (0, 1)


# --- how they end --------------------------------------------------------------------------------------------------------
def test_trained_and_sampled(there, capsys):
    """The two for real; the same command again has nothing to do."""
    words = ["train", "tiny.yaml", "--out", "run"]
    assert cli.main(words) == 0
    assert config.load(Path("run/config.yaml")) == config.load(TINY)
    assert cli.main(words) == 0
    assert cli.main([*words, "--set", "batch=5"]) == 1
    err = capsys.readouterr().err
    assert "scoresde: run holds a run of another configuration: batch was 4, is 5." in err
    assert "Traceback" not in err
    assert cli.main(["train", "tiny.yaml", "--out", "x", "--set", "data.source=./none.npy"]) == 1
    assert cli.main(["train", "tiny.yaml", "--out", "y", "--set", "net={name: UNet}"]) == 1
    assert "shape" in capsys.readouterr().err
    checkpoint.save("m", s.Preconditioned(s.MLP(2, width=8, depth=1, emb=4), s.VP()))
    assert cli.main(["sample", "m", "--seeds", "0-5", "--nfe", "4", "--out", "samples"]) == 0
    assert list(Path("samples").glob("*.npz"))
    assert cli.main(["sample", "none", "--out", "z"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("scoresde: ")


ENDS = [(KeyboardInterrupt(), 130), (OSError("full"), 1), (s.NonFiniteError("NaN"), 1), (MemoryError(), 1)]


@pytest.mark.parametrize(("error", "code"), ENDS, ids=repr)
def test_errors_at_work(error, code, there, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(run, "run", fail)
    monkeypatch.setattr(generate, "run", fail)
    monkeypatch.setattr(evaluate, "run", fail)
    for words in (["train", "tiny.yaml"], ["sample", "m"], ["evaluate", "a.npy", "b.npy"]):
        assert cli.main(words) == code
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("interrupted" if code == 130 else "scoresde: ")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_with_a_checkpoint(number, code, there):
    words = [sys.executable, "-m", "scoresde", "train", "tiny.yaml", "--set", "steps=1000000", "every.checkpoint=0", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(s.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        end = time.monotonic() + 120
        while not Path("run/metrics.jsonl").exists() and running.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        running.send_signal(number)
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == code, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert list(Path("run/checkpoints").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
def test_exit_codes_of_the_module(there):
    """In processes of their own: what a shell sees."""
    environment = {**os.environ, "PYTHONPATH": str(Path(s.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    codes = {"train tiny.yaml --set step=3": 2, "train tiny.yaml --out tiny.yaml": 1}
    for words, code in codes.items():
        done = subprocess.run(
            [sys.executable, "-m", "scoresde", *words.split()],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr


def test_the_command_is_installed():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"scoresde": "scoresde.cli:main"}
    assert {"tyro", "pyyaml"} <= {name.split(">")[0] for name in project["dependencies"]}


def test_a_start_by_torchrun_again_drops_nothing(there, calls, monkeypatch):
    for count, wanted in (("0", True), ("1", False), ("x", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        for words in (["train", "tiny.yaml"], ["sample", "m"], ["evaluate", "a.npy", "b.npy"]):
            assert cli.main([*words, "--overwrite"]) == 0
            assert calls[-1][1]["overwrite"] is wanted


def test_an_error_of_all_is_said_once_and_a_lost_process_in_words(there, rank, monkeypatch, capsys):
    raw = "[/__w/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"

    def fail(*_, **__):
        raise RuntimeError(raw)

    monkeypatch.setattr(evaluate, "run", fail)
    rank(0)
    assert cli.main(["evaluate", "a", "b"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("scoresde: rank 0: another process of this job has ended or was not heard of")
    assert "pair.cc:537" in err
    rank(1)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "a", "b"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == ""


def test_errors_of_the_system_have_a_mend():
    assert command.said(OSError(errno.EFBIG, "File too large")) == "File too large; raise the largest file size (ulimit -f)"
    assert command.said(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "x: No such file"
    assert command.said(ValueError("a")) == "a"


def test_likelihood_told_to_end_says_143(there, monkeypatch):
    monkeypatch.setattr("scoresde.densities.run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        cli.main(["likelihood", "m", "x.npy"])
    assert stop.value.code == 143
