"""`scoresde train` and `scoresde sample`: what they take, what they hand on, and how they end."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import scoresde as s
from scoresde import checkpoint, cli, config, generate, run
from scoresde.config import Choice

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
}  # fmt: skip
KEYS = {
    "Data": "source part folder labels levels conditional flip held_out dequantize low high workers",
    "Average": "decay std", "Every": "log checkpoint keep average validate sample fid", "Samples": "count nfe columns fid features",
    "Config": "data sde net parameterization weight times spread objective optimizer steps batch accumulate clip warmup decay precision "
    "compile channels_last label_dropout patience ema every samples seed device tensorboard",
}  # fmt: skip


def test_the_options_are_these():
    """They are what scripts hold on to: a change here is one of the interface."""
    for kind, wanted in OPTIONS.items():
        assert {f.name: f.type.replace('"', "'") for f in dataclasses.fields(kind)} == wanted
    for name, keys in KEYS.items():
        assert [f.name for f in dataclasses.fields(getattr(config, name))] == keys.split()
    assert {f.name for f in dataclasses.fields(generate.Settings)} <= set(OPTIONS[cli.Sample])


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    kind = {"train": cli.Train, "sample": cli.Sample}[command]
    for field in dataclasses.fields(kind)[1:]:
        assert f"--{field.name} " in text
    if command == "train":
        for key in KEYS["Config"].split()[1:]:
            assert f"\n  {key}" in text
        assert "  optimizer=AdamW" in text


def test_every_command_is_listed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for command in ("train", "sample", "demo", "likelihood"):
        assert f"\n    {command}" in text
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
    assert first == {"overwrite": False}
    assert made[0] == config.load(TINY, ["optimizer.lr=1e-4", "sde=VE", "steps=7"])
    assert (made[0].sde, made[1], second) == (Choice("VE"), Path("a/b"), {"overwrite": True})
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
    assert first == {"processes": 1, "overwrite": False}
    wanted = generate.Settings(
        seeds=generate.parse_seeds("0-4999,6000"), nfe=18, solver="DPMSolverPP:order=3", format="npz", batch=32, labels=3,
        weights="ema_0.9", dtype="float64", levels=16, low=-2.5, high=3.0,
    )  # fmt: skip
    assert made == (Path("m"), Path("o"), wanted)
    assert second == {"processes": 2, "overwrite": True}
    assert third[2] == generate.Settings(labels="cycle", steps=4, subdirs=True)


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
    for words in (["train", "tiny.yaml"], ["sample", "m"]):
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
