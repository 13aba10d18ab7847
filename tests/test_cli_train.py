"""`scoresde train`: the same run however often it is killed, what it writes, and what it refuses."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scoresde as s
from scoresde import checkpoint, cli, config, reports, store
from scoresde.job import prepare
from scoresde.run import average, run

TEXT = """
data: {source: digits, conditional: true, held_out: 60, dequantize: true, flip: true}
net: {name: UNet, channels: 8, dropout: 0.1}
steps: 45
batch: 8
accumulate: 2
warmup: 5
decay: cosine
label_dropout: 0.2
ema: [{decay: 0.9}, {std: 0.1}]
every: {log: 4, checkpoint: 7, keep: 2, validate: 15, sample: 20}
samples: {count: 4, nfe: 3}
"""
SAME = ("metrics.jsonl", "metrics.csv", "validation.jsonl", "config.yaml")  # files that do not know when a run was stopped


def short(*overrides):
    return config.load(TEXT, overrides)


def _child(words, folder):
    torch.set_num_threads(1)
    run(config.load(TEXT, words), Path(folder), say=lambda text: None)


def start(folder, *words):
    process = multiprocessing.get_context("fork").Process(target=_child, args=(words, str(folder)))
    process.start()
    return process


def same(a, b):
    """The last checkpoint, the logs and the pictures of two runs, to the byte."""
    for name in SAME:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    last = store.latest(a / "checkpoints").name
    names = {p.name for p in (a / "checkpoints" / last).iterdir()}
    assert {"model.safetensors", "ema_0.9.safetensors", "ema_std0.1.safetensors", "optimizer.safetensors", "state.json"} <= names
    for name in names:
        assert (a / "checkpoints" / last / name).read_bytes() == (b / "checkpoints" / last / name).read_bytes(), name
    assert [p.name for p in sorted((a / "samples").iterdir())] == [p.name for p in sorted((b / "samples").iterdir())]
    for path in (a / "samples").iterdir():
        assert path.read_bytes() == (b / "samples" / path.name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return folder


# --- resume --------------------------------------------------------------------------------------------------------------
def killed(folder, kills, seed):
    """Start the run and kill it at a random moment, `kills` times or until it ends; then let it end. How many kills hit."""
    draw, hit = random.Random(seed), 0  # noqa: S311
    for _ in range(kills):
        process = start(folder)
        time.sleep(draw.uniform(0.05, 2.0))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            hit += 1
        process.join()
        if process.exitcode == 0:
            break
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return hit


def test_a_run_killed_again_and_again_is_the_run_that_was_not(whole, tmp_path):
    hit = killed(tmp_path / "run", 4, 0)
    assert hit >= 1
    same(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_random_kills(whole, tmp_path):
    hit, n = 0, 0
    while hit < 30:
        hit += killed(tmp_path / str(n), 30 - hit, 100 + n)
        same(whole, tmp_path / str(n))
        n += 1
    print(f"{hit} kills over {n} runs, every one resumed to the same bytes")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_what_is_kept_change_nothing(whole, tmp_path, workers):
    process = start(tmp_path, f"data.workers={workers}", "every.keep=1")
    process.join()
    for name in SAME[:3]:
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes()
    last = "checkpoints/step-00000045/manifest.json"
    assert (whole / last).read_bytes() == (tmp_path / last).read_bytes()
    assert len(store.steps(tmp_path / "checkpoints")) == 1


@pytest.mark.parametrize(("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_saves_it(whole, tmp_path, number, status):
    (tmp_path / "c.yaml").write_text(TEXT)
    words = [sys.executable, "-m", "scoresde", "train", "c.yaml", "--out", "run", "--set", "every.checkpoint=0"]
    restored = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=restored)
    log = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "which is in a checkpoint: the same command goes on" in errors
    assert "Traceback" not in errors
    (step,) = store.steps(tmp_path / "run" / "checkpoints")
    assert 8 <= step < 45
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False).returncode == 0
    for name in SAME[:3]:
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    model = [checkpoint.read(f / "checkpoints").tensors["model"] for f in (whole, tmp_path / "run")]
    assert all(torch.equal(model[0][k], model[1][k]) for k in model[0])


def test_a_finished_run_is_finished_and_a_longer_one_goes_on(whole, tmp_path):
    words = ("decay=none", "every.validate=0", "every.sample=0")
    for steps in (20, 33):
        said = []
        summary = run(short(*words, f"steps={steps}"), tmp_path / "a", say=said.append)
        assert summary["step"] == steps
    assert said[0] == "going on after step 20 of 33"
    run(short(*words, "steps=33"), tmp_path / "b", say=said.append)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    before = (tmp_path / "a/checkpoints/step-00000033/manifest.json").stat().st_mtime_ns
    again = run(short(*words, "steps=33"), tmp_path / "a", say=said.append)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    assert (tmp_path / "a/checkpoints/step-00000033/manifest.json").stat().st_mtime_ns == before


def test_another_configuration_is_refused_and_overwrite_starts_afresh(tmp_path):
    small = ("steps=3", "every.validate=0", "every.sample=0")
    run(short(*small), tmp_path, say=lambda text: None)
    with pytest.raises(FileExistsError, match=r"another configuration: batch was 8, is 16\. choose.*--overwrite"):
        run(short(*small, "batch=16"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    run(short(*small, "batch=16"), tmp_path, overwrite=True, say=lambda text: None)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(FileExistsError, match=r"no config.yaml to say which"):
        run(short(*small), tmp_path)


def test_other_data_under_the_same_name_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((50, 3), np.float32) + np.arange(3, dtype=np.float32))
    chosen = config.load(f"data: {{source: {tmp_path / 'x.npy'}}}\nsteps: 2\nbatch: 4")
    run(chosen, tmp_path / "run", say=lambda text: None)
    np.save(tmp_path / "x.npy", np.zeros((50, 4), np.float32))
    with pytest.raises(FileExistsError, match="other data or another network"):
        run(chosen, tmp_path / "run")

    np.save(tmp_path / "x.npy", np.ones((50, 3), np.float32))
    with pytest.raises(FileExistsError, match="other data or another network"):
        run(chosen, tmp_path / "run")


QUIET = ("every.validate=0", "every.sample=0")


def test_a_first_run_that_fails_pins_nothing(tmp_path):
    with pytest.raises(ValueError, match="patch is 5"):
        run(short("net={name: DiT, patch: 5}", *QUIET), tmp_path / "run")
    run(short("steps=2", *QUIET), tmp_path / "run", say=lambda text: None)
    with pytest.raises(ValueError, match="patch is 5"):
        run(short("net={name: DiT, patch: 5}", *QUIET), tmp_path / "run", overwrite=True)
    assert store.steps(tmp_path / "run/checkpoints")


def test_overwrite_removes_runs_alone(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no config.yaml to say which"):
        run(short("steps=2", *QUIET), tmp_path, overwrite=True)
    assert (tmp_path / "samples/thesis.txt").read_text() == "mine"


def test_a_signal_during_a_report_is_answered_with_a_checkpoint(tmp_path, monkeypatch):
    real = reports.draw

    def draw(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(reports, "draw", draw)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(short("every.checkpoint=0", "every.validate=0", "every.sample=10"), tmp_path, say=lambda text: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(store.steps(tmp_path / "checkpoints")) == [10]


def test_an_sde_of_lists_is_resumed(tmp_path):
    words = ("sde={name: DiscreteVP, betas: [0.1, 0.2, 0.3, 0.5, 0.9]}", "decay=none", *QUIET)
    for steps in (2, 4):
        assert run(short(*words, f"steps={steps}"), tmp_path, say=lambda text: None)["step"] == steps


def test_stored_averages_that_a_disk_refused_do_not_stop_a_resumed_run(tmp_path, monkeypatch, capsys):
    real = checkpoint.write

    def fails(folder, step, *args, **kwargs):
        if Path(folder).name == "averages" and step == 3:
            raise store.SaveError(28, "No space left on device")
        if Path(folder).name == "checkpoints":
            raise KeyboardInterrupt
        return real(folder, step, *args, **kwargs)

    words = ("steps=8", "every.average=3", "every.checkpoint=7", *QUIET)
    monkeypatch.setattr(checkpoint, "write", fails)
    with pytest.raises(KeyboardInterrupt):
        run(short(*words), tmp_path, say=lambda text: None)
    monkeypatch.setattr(checkpoint, "write", real)
    run(short(*words), tmp_path, say=lambda text: None)
    assert list(store.steps(tmp_path / "averages")) == [6]
    assert capsys.readouterr().err.count("without stored averages of step 3") == 2


def test_what_is_held_out_is_validated_with_its_labels(tmp_path):
    run(short("steps=2", "every.validate=2", "every.sample=0", "label_dropout=0"), tmp_path, say=lambda text: None)
    job = prepare(short())
    model = checkpoint.load(tmp_path)
    labels = torch.from_numpy(job.held_out.labels)
    x0 = job.seen(job.held_out, 60)
    _, loss = s.train.loss_by_level(model, x0, cond=labels)
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == pytest.approx(loss.tolist(), rel=1e-6)
    _, without = s.train.loss_by_level(model, x0)
    assert without.shape == loss.shape


@pytest.mark.parametrize("held", [0, 100])
def test_the_floor_is_of_other_data_than_the_reference(tmp_path, monkeypatch, held):
    seen = []
    real = reports.Scorer.__post_init__

    def keep(self):
        seen.append(self.reference)
        real(self)

    monkeypatch.setattr(reports.Scorer, "__post_init__", keep)
    call = reports.Scorer.__call__
    monkeypatch.setattr(reports.Scorer, "__call__", lambda self, x: (seen.append(x), call(self, x))[1])
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32))
    text = f"data: {{source: {tmp_path / 'x.npy'}, held_out: {held}}}\nsteps: 1\nbatch: 4\nevery: {{fid: 1}}\nsamples: {{fid: 100, nfe: 2}}"
    run(config.load(text), tmp_path / "run", say=lambda text: None)
    reference, floor = seen[:2]
    rows = {tuple(row) for row in reference.tolist()}
    assert len(floor) == 100
    assert not rows & {tuple(row) for row in floor.tolist()}


@pytest.mark.parametrize(
    ("words", "shape", "kind", "text"),
    [
        (("every.fid=1",), (20, 3, 64, 64), ValueError, "no features to compare"),
        (("every.fid=1", "data.held_out=1"), (20, 1, 8, 8), ValueError, "1 entries to compare"),
        (("device=cuda:7",), (20, 1, 8, 8), ValueError, "device is 'cuda:7'"),
    ],
)
def test_what_a_report_needs_is_asked_before_the_first_step(tmp_path, words, shape, kind, text):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    with pytest.raises(kind, match=text):
        run(config.load(f"data: {{source: {tmp_path / 'x.npy'}}}\nsteps: 1\nbatch: 2", words), tmp_path / "run")


def test_no_checkpoint_is_made_of_numbers_that_are_not_finite(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(s.Training, "finite", lambda self: self.step < 14)
    with pytest.raises(s.NonFiniteError, match="no checkpoint is made of it"):
        run(short(*QUIET), tmp_path, say=lambda text: None)
    assert list(store.steps(tmp_path / "checkpoints")) == [7]


STATES = {
    "no updates": lambda state, optimizer: state.pop("updates"),
    "another step": lambda state, optimizer: state.update(step=10**30),
    "a truth for a step": lambda state, optimizer: state.update(step=True),
    "no pending": lambda state, optimizer: state.pop("pending"),
    "pending of words": lambda state, optimizer: state.update(pending=["x"]),
    "no state": lambda state, optimizer: optimizer.update(state=None),
    "groups of numbers": lambda state, optimizer: optimizer.update(param_groups=[5]),
    "no rate": lambda state, optimizer: optimizer["param_groups"][0].pop("lr"),
}


@pytest.mark.parametrize("harm", STATES.values(), ids=STATES)
def test_a_checkpoint_made_by_hand_is_refused_by_name(tmp_path, harm):
    words = ("steps=2", "decay=none", *QUIET)
    run(short(*words), tmp_path, say=lambda text: None)
    path = tmp_path / "checkpoints/step-00000002"
    files = {name: json.loads((path / f"{name}.json").read_text()) for name in ("state", "optimizer")}
    harm(files["state"], files["optimizer"])
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    store.seal(path, step=2)
    with pytest.raises(ValueError, match="step-00000002"):
        run(short("steps=4", *words[1:]), tmp_path, say=lambda text: None)


def test_two_writers_are_refused(tmp_path):
    with store.locked(tmp_path), pytest.raises(RuntimeError, match="another run is at work"):
        run(short(), tmp_path)


# --- when the disk fails -------------------------------------------------------------------------------------------------
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(whole, tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.write, []

    def fails(folder, step, *args, **kwargs):
        calls.append(step)
        if step in (14, 21):
            raise store.SaveError(28, f"step {step} was not saved: No space left on device")
        return real(folder, step, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", fails)
    run(short(), tmp_path, say=lambda text: None)
    assert calls == [7, 14, 21, 28, 35, 42, 45]
    assert capsys.readouterr().err.count("the training goes on without a checkpoint of step") == 2
    same(whole, tmp_path)


def test_the_last_checkpoint_must_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write", lambda *a, **k: (_ for _ in ()).throw(store.SaveError(28, "No space left on device")))
    with pytest.raises(store.SaveError, match="No space left"):
        run(short("steps=2", "every.validate=0", "every.sample=0"), tmp_path)
    assert not (tmp_path / "summary.json").exists()


def _limited(folder):
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a checkpoint is larger, a log is not
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        run(short("steps=10", "every.validate=0", "every.sample=0"), Path(folder), say=lambda text: None)
    except OSError as error:
        print(error)
        os._exit(7)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path, capfd):
    run(short("steps=3", "decay=none", "every.validate=0", "every.sample=0"), tmp_path, say=lambda text: None)
    kept = (tmp_path / "checkpoints/step-00000003/manifest.json").read_bytes()
    (tmp_path / "config.yaml").write_text(config.dump(short("steps=10", "every.validate=0", "every.sample=0")))
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(str(tmp_path),))
    process.start()
    process.join()
    out = capfd.readouterr()
    assert process.exitcode == 7
    assert "the training goes on without a checkpoint of step 7" in out.err
    assert "step-00000003" in out.out
    assert "File too large" in out.out
    assert (tmp_path / "checkpoints/step-00000003/manifest.json").read_bytes() == kept
    checkpoint.read(tmp_path / "checkpoints")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".step")] == []


# --- what it writes ------------------------------------------------------------------------------------------------------
def test_the_folder_of_a_run(whole):
    names = {p.name for p in whole.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.csv", "metrics.jsonl", "speed.csv", "speed.jsonl", "summary.json"} <= names
    assert {"validation.csv", "validation.png", "loss.png", "samples", "checkpoints"} <= names
    assert config.load(whole / "config.yaml") == short()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == list(range(4, 45, 4))
    assert [r["step"] for r in rows if "validation_loss" in r] == [15, 30, 45]
    assert rows[0]["lr"] == pytest.approx(1e-3 * 4 / 5 * (0.5 + 0.5 * np.cos(np.pi * 3 / 45)))
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [f"step-{n:08d}.png" for n in (20, 40, 45)]
    assert Image.open(whole / "samples/step-00000020.png").size == (35, 8)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step"] == 45
    assert summary["epochs"] == pytest.approx(45 * 8 / 1737, abs=1e-3)
    assert summary["weights"] == "ema_0.9"
    assert "parameters" in json.loads((whole / "environment.json").read_text())


def test_a_run_is_a_model_to_everything_else(whole):
    model = checkpoint.load(whole)
    snapshot = checkpoint.read(whole / "checkpoints")
    assert all(torch.equal(v, snapshot.tensors["ema_0.9"][k]) for k, v in model.net.state_dict().items())
    raw = checkpoint.load(whole, weights="model")
    assert all(torch.equal(v, snapshot.tensors["model"][k]) for k, v in raw.net.state_dict().items())
    assert s.sample(model.condition(torch.tensor([0, 1])), (2, 1, 8, 8), nfe=3, seeds=range(2)).x.isfinite().all()


def test_the_log_is_the_loss_of_the_steps(tmp_path):
    chosen = short("steps=9", "every.log=3", "every.validate=0", "every.sample=0")
    run(chosen, tmp_path, say=lambda text: None)
    job = prepare(chosen)
    steps = list(job.fit(job.batches))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        part = steps[3 * i : 3 * i + 3]
        assert row["loss"] == pytest.approx(sum(step.loss for step in part) / 3, rel=1e-12)
        assert (row["grad_norm"], row["lr"], row["step"]) == (part[-1].grad_norm, part[-1].lr, part[-1].step)
    ours = job.training.tensors()
    there = checkpoint.read(tmp_path / "checkpoints").tensors
    assert all(torch.equal(ours[name][k], there[name][k]) for name in ours for k in ours[name])


def test_stored_averages_become_one_of_another_width(tmp_path):
    words = (
        "steps=60",
        "ema=[{std: 0.05}, {std: 0.1}, {std: 0.15}]",
        "every.average=5",
        "every.validate=0",
        "every.sample=0",
        "decay=none",
    )
    run(short(*words), tmp_path, say=lambda text: None)
    assert list(store.steps(tmp_path / "averages")) == list(range(5, 61, 5))
    last = checkpoint.read(tmp_path / "checkpoints").tensors
    for std in (0.05, 0.15):
        made = average(tmp_path, std).net.state_dict()
        apart = max(float((made[k] - v).abs().max()) for k, v in last[f"ema_std{std}"].items())
        assert apart < 1e-5 * max(float(v.abs().max()) for v in made.values())
    between = average(tmp_path, 0.07).net.state_dict()
    assert any(not torch.equal(between[k], v) for k, v in last["ema_std0.05"].items())
    (tmp_path / "averages/step-00000060/manifest.json").unlink()
    assert average(tmp_path, 0.1, step=30).net.state_dict().keys() == between.keys()
    with pytest.raises(ValueError, match="stored power averages of 0 widths"):
        average(tmp_path / "nothing", 0.1)


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(short("steps=8", "tensorboard=true", "every.validate=0", "every.sample=0"), tmp_path, say=lambda text: None)
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(r["step"], pytest.approx(r["loss"])) for r in rows]


def test_vectors_are_trained_scored_and_drawn(tmp_path):
    rows = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32) * [1.0, 0.3]
    np.save(tmp_path / "x.npy", rows.astype(np.float32))
    text = (
        f"data: {{source: {tmp_path / 'x.npy'}, held_out: 0.25}}\nnet: {{name: MLP, width: 32, depth: 1}}\nsteps: 60\nbatch: 64\n"
    )
    text = text.replace("0.25", "100") + "every: {sample: 60, fid: 60, validate: 60}\nsamples: {nfe: 8, fid: 200}\n"
    summary = run(config.load(text), tmp_path / "run", say=lambda text: None)
    assert Image.open(tmp_path / "run/samples/step-00000060.png").size[0] > 100
    record = json.loads((tmp_path / "run/fid.json").read_text())
    assert record["features"]["name"] == "pixels"
    assert 0 < record["floor"] < 0.1
    assert record["floor"] < summary["fid@200"] < 1


def test_a_folder_a_class_trains_a_conditional_network(tmp_path):
    draw = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.uint8(np.clip(draw.normal(level, 10, (8, 8, 3)), 0, 255))).save(tmp_path / f"data/{name}/{i}.png")
    text = f"data: {{source: {tmp_path / 'data'}, conditional: true}}\nnet: {{name: UNet, channels: 8}}\nsteps: 3\nbatch: 8\n"
    text += "every: {fid: 3}\n"
    run(config.load(text + "samples: {fid: 8, nfe: 3}"), tmp_path / "run", say=lambda text: None)
    described = checkpoint.read(tmp_path / "run/checkpoints").config
    assert described["net"]["classes"] == 2
    known = described["data"]
    assert len(known.pop("sha256_of_some")) == 64
    assert known == {"source": str(tmp_path / "data"), "entries": 24, "shape": [3, 8, 8], "levels": 256, "low": -1.0, "high": 1.0}
    assert json.loads((tmp_path / "run/fid.json").read_text())["features"]["name"] == "cnn-2-classes"


def test_importance_and_learned_uncertainty_train_from_a_file(tmp_path):
    words = ("steps=6", "every.checkpoint=4", "weight.name=likelihood", "times.name=importance", "objective.name=Uncertainty",
             "every.validate=0", "every.sample=0")  # fmt: skip
    run(short(*words), tmp_path / "a", say=lambda text: None)
    found = checkpoint.read(tmp_path / "a/checkpoints")
    assert "objective" in found.tensors
    run(short(*words), tmp_path / "b", say=lambda text: None)
    store.prune(tmp_path / "b/checkpoints", 2)
    (tmp_path / "b/checkpoints/step-00000006").rename(tmp_path / "gone")
    run(short(*words), tmp_path / "b", say=lambda text: None)
    again = checkpoint.read(tmp_path / "b/checkpoints")
    assert all(torch.equal(v, again.tensors["objective"][k]) for k, v in found.tensors["objective"].items())


# --- what it refuses, and how it ends ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--set", "optimizer.lr=fast"], 2, "optimizer.lr"),
        (["--set", "stepps=3"], 2, "steps"),
        (["--set", "data.source=nowhere/at/all"], 1, "nowhere/at/all"),
        (["--set", "optimizer.lr=1e30", "clip=.inf", "patience=2", "every.validate=0", "every.sample=0"], 1, "in a row"),
        (["--set", "data.conditional=false", "label_dropout=0.1"], 2, "label_dropout"),
    ],
)
def test_exit_codes(tmp_path, capsys, words, status, text):
    (tmp_path / "c.yaml").write_text(TEXT)
    try:
        found = cli.main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run"), *words])
    except SystemExit as error:
        found = error.code
    assert found == status
    assert text in capsys.readouterr().err


def test_labels_are_wanted_where_they_are_given_to_the_network(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 1, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="has no labels"):
        prepare(config.load(f"data: {{source: {tmp_path / 'x.npy'}, conditional: true}}"))
    np.save(tmp_path / "v.npy", np.zeros((20, 3), np.float32))
    with pytest.raises(ValueError, match="no grey levels"):
        prepare(config.load(f"data: {{source: {tmp_path / 'v.npy'}, dequantize: true}}"))


def test_features_are_saved_and_verified(tmp_path):
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(60, 1, 8, 8, generator=draw), torch.arange(60) % 3
    found = reports.learn_features(tmp_path / "f", images + labels[:, None, None, None], labels, 3)
    again = reports.load_features(tmp_path / "f")
    assert found.sha256 == again.sha256
    assert torch.equal(found(images), again(images))
    data = bytearray((tmp_path / "f/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "f/model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors is not the file"):
        reports.load_features(tmp_path / "f")


# --- memory --------------------------------------------------------------------------------------------------------------
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def _steps(folder, queue):
    torch.set_num_threads(1)
    text = "data: {source: digits}\nnet: {name: MLP, width: 128}\nsteps: 1200\nbatch: 32\nema: [{decay: 0.99}, {std: 0.1}]\n"
    job, sizes = prepare(config.load(text)), []
    for step in job.fit(job.batches):
        if step.step % 200 == 0:
            sizes.append(resident())
    queue.put(sizes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_flat_over_a_thousand_steps(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_steps, args=(str(tmp_path), queue))
    process.start()
    sizes = queue.get(timeout=250)
    process.join()
    print(f"resident MiB after 200, 400, ..., 1200 steps: {[round(v, 1) for v in sizes]}")
    assert sizes[-1] - sizes[0] < 0.01 * sizes[0]
