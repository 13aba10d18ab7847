"""`scoresde train` on many processes: the folder of one, whoever goes on with it, however it ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Failed

from scoresde import checkpoint, config, reports, store, train
from scoresde.job import Job, prepare
from scoresde.logs import Log
from scoresde.parallel import ALONE, Elsewhere
from scoresde.run import run
from scoresde.watch import Watch

TEXT = """
data: {source: digits, conditional: true, held_out: 60, dequantize: true, flip: true}
net: {name: MLP, width: 16, depth: 1}
steps: 6
batch: 7
accumulate: 2
label_dropout: 0.2
ema: [{decay: 0.9}, {std: 0.1}]
every: {log: 1, checkpoint: 3, keep: 9, average: 3, validate: 3, sample: 3}
samples: {count: 5, nfe: 3}
"""
QUIET = ("every.validate=0", "every.sample=0", "every.average=0")


def go(group, folder, *words, overwrite=False):
    said = []
    summary = run(config.load(TEXT, words), Path(folder), say=said.append, group=group, overwrite=overwrite)
    return {k: v for k, v in summary.items() if k != "seconds"}, said


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def like(found, wanted, rtol=1e-5):
    """The same rows, with numbers that agree."""
    assert [list(row) for row in found] == [list(row) for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=rtol), (a, b)


def last(folder):
    found = checkpoint.read(folder)
    return {f"{name}/{k}": v for name, part in found.tensors.items() for k, v in part.items()}, found.state


def equal(a, b):
    one, other = last(a), last(b)
    return one[1] == other[1] and one[0].keys() == other[0].keys() and all(torch.equal(v, other[0][k]) for k, v in one[0].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, *go(ALONE, folder)


@pytest.mark.parametrize("mode", ["sharded=false", "sharded=true"])
def test_the_folder_is_that_of_one_process(mode, alone, two, tmp_path):
    (summary, said), (other, nothing) = two(go, tmp_path / "run", mode)
    assert files(tmp_path / "run") == files(alone[0])
    like(rows(tmp_path / "run"), rows(alone[0]))
    like(rows(tmp_path / "run", "validation"), rows(alone[0], "validation"))
    assert summary == other
    numbers = lambda found: {k: v for k, v in found.items() if not isinstance(v, str)}
    assert numbers(summary) == pytest.approx(numbers(alone[1]), rel=1e-5)
    assert len(said) == 1
    assert nothing == []
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert (about["processes"], about["mode"]) == (2, "FSDP2" if mode == "sharded=true" else "DistributedDataParallel")
    assert about["network"] == "MLP"
    ours, there = last(tmp_path / "run"), last(alone[0])
    assert {k: v.shape for k, v in ours[0].items()} == {k: v.shape for k, v in there[0].items()}
    assert ours[1].keys() == there[1].keys()
    assert checkpoint.load(tmp_path / "run").net.config == checkpoint.load(alone[0]).net.config


def test_a_run_goes_on_with_more_and_fewer_processes(two, tmp_path):
    """Alone, sharded, in parallel, alone; each starts from the bits of the one before."""
    words = (*QUIET, "data.dequantize=false")
    ways = [(None, "sharded=true"), (two, "sharded=true"), (two, "sharded=false"), (None, "sharded=false")]
    for n, (group, mode) in enumerate(ways, 1):
        args = (tmp_path / "run", *words, mode, f"steps={2 * n}", "every.checkpoint=0")
        found = go(ALONE, *args) if group is None else group(go, *args)[0]
        assert (found[0]["step"], found[1][0].startswith("going on")) == (2 * n, n > 1)
    go(ALONE, tmp_path / "whole", *words, "steps=8")
    like(rows(tmp_path / "run"), rows(tmp_path / "whole"), 1e-4)
    about = (tmp_path / "run/environment.json").read_bytes()
    again = two(go, tmp_path / "run", *words, "steps=8")  # all done
    assert again[0][1][0] == "all 8 steps are done"
    assert (tmp_path / "run/environment.json").read_bytes() == about  # of those that have trained


def stopped(group, folder, mode):
    """A signal to one process alone, in the middle of a step."""
    real = reports.Scale.__call__
    calls = []

    def scale(self, x, generator):
        calls.append(1)
        if group.rank == group.world - 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)  # a second one, as torchrun may send
        return real(self, x, generator)

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reports.Scale.__call__ = scale
    try:
        go(group, folder, mode, "every.checkpoint=0")
    finally:
        reports.Scale.__call__ = real
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize("mode", ["sharded=false", "sharded=true"])
def test_a_signal_to_one_stops_all_after_the_same_step(mode, two, tmp_path):
    with pytest.raises(Failed) as caught:
        two(stopped, tmp_path / "run", mode)
    assert caught.value.errors == [(SystemExit, "143"), (SystemExit, "143")]
    assert list(store.steps(tmp_path / "run/checkpoints")) == [3]
    two(go, tmp_path / "run", mode, "every.checkpoint=0")
    two(go, tmp_path / "whole", mode, "every.checkpoint=0")
    assert equal(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


# --- what it shows -------------------------------------------------------------------------------------------------------
def shown(group, folder, where, text):
    """All reports of one network, which is not trained any further."""
    job = prepare(config.load(text), group)
    found = checkpoint.read(folder)
    job.training.restore(found.tensors, found.state, found.optimizer)
    job.described()
    if job.config.sharded:
        from scoresde.sharded import shard

        shard(job.training, group, least=1)
    mine = Path(where) / str(group.rank)
    mine.mkdir(parents=True)
    watch = Watch(job, mine, Log(mine), Log(mine, "validation"))
    watch(job.config.steps)
    return mine


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_reports_are_those_of_one_process_to_the_bit(world, request, tmp_path):
    """Loss of 600 held out, 70 samples in blocks of 64: a grid, and a distance with its floor, of a network that is sharded."""
    draw = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", draw.normal(size=(1500, 2)).astype(np.float32))
    text = f"data: {{source: {tmp_path / 'x.npy'}, held_out: 600}}\nnet: {{name: MLP, width: 16, depth: 1}}\nsteps: 2\nbatch: 8\n"
    text += "ema: [{decay: 0.9}]\nevery: {validate: 2, sample: 2, fid: 2}\nsamples: {count: 70, fid: 200, nfe: 4}\n"
    run(config.load(text), tmp_path / "run", say=lambda text: None)
    for n, mode in enumerate(("", "sharded: true\n", "sharded: true\nema: []\n")):
        text = text.replace("ema: [{decay: 0.9}]\n", "") if "ema: []" in mode else text
        folder = tmp_path / "run"
        if "ema: []" in mode:
            folder = tmp_path / "plain"
            run(config.load(text + "ema: []\n"), folder, say=lambda text: None)
        one = shown(ALONE, folder, tmp_path / f"alone{n}", text + mode)
        first, *_ = request.getfixturevalue({2: "two", 3: "three"}[world])(shown, folder, tmp_path / f"many{n}", text + mode)
        assert files(first) == files(one)
        assert {"metrics.jsonl", "validation.jsonl", "fid.json", "samples/step-00000002.png"} <= set(files(one))
        for name in files(one):
            assert (first / name).read_bytes() == (one / name).read_bytes(), name


def sick(group, folder):
    """A report that fails in one process alone."""
    real = reports.draw

    def draw(*args, **kwargs):
        if group.rank == 1:
            raise ArithmeticError("a sample is not finite")
        return real(*args, **kwargs)

    reports.draw = draw
    try:
        return go(group, folder)
    finally:
        reports.draw = real


def test_a_report_that_fails_in_one_process_is_forgiven_in_all(two, tmp_path):
    (a, _), (b, _) = two(sick, tmp_path / "run")
    assert a == b
    assert a["step"] == 6
    assert not list((tmp_path / "run").glob("samples/*.png"))
    assert [row["step"] for row in rows(tmp_path / "run") if "validation_loss" in row] == [3, 6]


def blind(group, folder, what):
    """Held-out data that one process alone cannot read, or use."""
    real = Job.seen, train.seeded

    def fails(*args, **kwargs):
        raise OSError(5, "Input/output error") if what == "data" else ArithmeticError("a loss is not finite")

    if group.rank == 1 and what == "data":
        Job.seen = fails
    elif group.rank == 1:
        train.seeded = fails
    try:
        return go(group, folder, "every.sample=0", "every.average=0")
    finally:
        Job.seen, train.seeded = real


@pytest.mark.parametrize("what", ["data", "loss"])
def test_a_validation_that_fails_in_one_process_is_forgiven_in_all(what, two, tmp_path):
    (a, _), (b, _) = two(blind, tmp_path / "run", what)
    assert a == b
    assert a["step"] == 6
    assert not [row for row in rows(tmp_path / "run") if "validation_loss" in row]


# --- when something fails ------------------------------------------------------------------------------------------------
def fails(group, folder, at):
    real = checkpoint.write

    def write(folder, step, *args, **kwargs):
        if step == at:
            raise store.SaveError(28, "No space left on device")
        return real(folder, step, *args, **kwargs)

    checkpoint.write = write
    try:
        return go(group, folder, *QUIET)
    finally:
        checkpoint.write = real


def test_a_disk_that_is_full_for_the_first_process(two, tmp_path):
    """In the middle it is said, and all go on; at the end it ends all."""
    (a, _), (b, _) = two(fails, tmp_path / "a", 3)
    assert a == b
    assert list(store.steps(tmp_path / "a/checkpoints")) == [6]
    with pytest.raises(Failed) as caught:
        two(fails, tmp_path / "b", 6)
    assert [error for error, _ in caught.value.errors] == [store.SaveError, Elsewhere]
    assert list(store.steps(tmp_path / "b/checkpoints")) == [3]


def differs(group, folder, what):
    before, words = Path.cwd(), ["label_dropout=0", *QUIET]
    if what == "configuration":
        words += [f"seed={group.rank}"]
    if what == "data":  # each has its own under the same name
        words += ["data={source: ./x.npy}"]
        os.chdir(folder / str(group.rank))
    try:
        go(group, folder / "run", *words)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    ("what", "words"), [("configuration", "differ in the configuration.*seed: 0.*seed: 1"), ("data", "differ in the data")]
)
def test_processes_that_differ_touch_nothing(what, words, two, tmp_path):
    for n in range(2):
        (tmp_path / str(n)).mkdir()
        np.save(tmp_path / f"{n}/x.npy", np.random.default_rng(n).integers(0, 256, (50, 1, 8, 8)).astype(np.uint8))
    with pytest.raises(Failed, match=words):
        two(differs, tmp_path, what)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_folder_in_use_and_another_configuration_end_all(two, alone, tmp_path):
    with store.locked(tmp_path), pytest.raises(Failed) as caught:
        two(go, tmp_path)
    assert caught.value.errors[0][0] is RuntimeError
    assert caught.value.errors[1] == (Elsewhere, "1")
    with pytest.raises(Failed) as caught:
        two(go, alone[0], "batch=8")
    assert caught.value.errors[0][0] is FileExistsError
    assert caught.value.errors[1] == (Elsewhere, "1")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("objective=sliced_score_matching",), "sharded: false, where DistributedDataParallel can"),
        (("objective=implicit_score_matching",), "sharded: false, where DistributedDataParallel can"),
        (("channels_last=true",), "FSDP2 cuts contiguous tensors alone"),
        (("objective=Uncertainty", "precision=fp16"), "wanted bf16"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_the_configuration(words, text):
    with pytest.raises(ValueError, match=text):
        config.load(TEXT, ("sharded=true", *words))
    config.load(TEXT, words)


def test_a_batch_of_fewer_rows_than_processes_is_refused(two, tmp_path):
    with pytest.raises(Failed, match="batch is 1 for 2 ranks; wanted at least a row each"):
        two(go, tmp_path / "run", "batch=1", "accumulate=1", *QUIET)


# --- torchrun ------------------------------------------------------------------------------------------------------------
LONG = ("net={name: UNet, channels: 8}", "steps=50", "every.log=5", "every.checkpoint=10", "every.keep=2", *QUIET)


def torchrun(folder, out):
    """The command, in two processes that torchrun starts again when one of them dies."""
    (folder / "c.yaml").write_text(TEXT)
    how = ["--standalone", "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.2", "-m", "scoresde"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *how, "train", "c.yaml", "--out", out, "--set", *LONG],
        cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def workers(process):
    """The ids of the processes that torchrun has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            ours = int(fields[1]) == process.pid and b"scoresde" in (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        found += [int(path.parent.name)] if ours else []
    return sorted(found)


def killed(folder, out, moment, delay, which):
    """Kill one of the two with SIGKILL some time after `moment` rows are in the log; the words of torchrun."""
    process, log = torchrun(folder, out), folder / out / "metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        if len(workers(process)) == 2 and (not moment or (log.exists() and log.read_bytes().count(b"\n") >= moment)):
            break
        time.sleep(0.02)
    time.sleep(delay)
    victims = workers(process)
    assert process.poll() is None
    assert len(victims) == 2
    os.kill(victims[which], signal.SIGKILL)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors[-3000:]
    return errors


@pytest.fixture(scope="module")
def undisturbed(two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    two(go, folder / "whole", *LONG)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_torchrun_starts_a_killed_process_again(undisturbed):
    errors = killed(undisturbed, "once", 3, 0, 1)
    assert "exitcode: -9" in errors
    assert equal(undisturbed / "once", undisturbed / "whole")
    assert (undisturbed / "once/metrics.jsonl").read_bytes() == (undisturbed / "whole/metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_random_kills_of_one_of_two(undisturbed):
    draw = random.Random(1)  # noqa: S311
    for n in range(10):
        moment, delay, which = draw.randrange(8), draw.uniform(0, 0.2), draw.randrange(2)
        killed(undisturbed, f"kill{n}", moment, delay, which)
        assert equal(undisturbed / f"kill{n}", undisturbed / "whole"), (n, moment, which)
        print(f"run {n}: process {which} killed {delay:.2f} s after row {moment}; ended with the bits of the undisturbed one")
