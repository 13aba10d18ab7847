"""The commands under a real torchrun, of two processes, against the plain ones: the same files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scoresde as s
from scoresde import cli

CONFIG = """
data: {source: x.npy, held_out: 5, dequantize: true}
net: {name: UNet, channels: 4, multipliers: [1]}
steps: 4
batch: 6
ema: [{decay: 0.9}]
every: {log: 1, checkpoint: 4, validate: 4, sample: 0, fid: 0}
"""


def together(*words):
    """The command under torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(Path(s.__file__).parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scoresde"]
    return subprocess.run([*run, *words], capture_output=True, text=True, env=environment, timeout=240, check=False)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder to stand in, with images and a model that the plain command has trained."""
    folder, before = tmp_path_factory.mktemp("torchrun"), Path.cwd()
    os.chdir(folder)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (37, 1, 8, 8)).astype(np.uint8))
    np.save("y.npy", np.load("x.npy")[::-1] // 2)
    Path("tiny.yaml").write_text(CONFIG)
    assert cli.main(["train", "tiny.yaml", "--out", "plain"]) == 0
    yield folder
    os.chdir(before)


def both(*words):
    """The folders of the plain command and of that under torchrun."""
    found = Path(f"{words[0]}-plain"), Path(f"{words[0]}-together")
    assert cli.main([*words, "--out", str(found[0])]) == 0
    done = together(*words, "--out", str(found[1]))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stdout.splitlines()) <= 2  # said once
    return found


def files(folder):
    """All that is in it, and the summary but for what the run itself was."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {**found, "summary.json": {k: v for k, v in json.loads(found["summary.json"]).items() if k != "run"}}


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {
            (row["step"], key): float(row[key]) for row in csv.DictReader(file) for key in ("loss", "validation_loss") if row[key]
        }


def test_train(there):
    done = together("train", "tiny.yaml", "--out", "train-together")
    assert done.returncode == 0, done.stderr
    one, two = losses(Path("plain")), losses(Path("train-together"))
    assert one.keys() == two.keys()
    assert len(one) == 5
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-6)
    assert json.loads(Path("train-together/environment.json").read_text())["processes"] == 2


WORDS = {
    "sample": "plain --seeds 0-8,20 --nfe 3 --batch 4 --format npz",
    "likelihood": "plain x.npy --steps 2 --batch 4 --count 10 --divergence rademacher",
    "evaluate": "x.npy y.npy --batch 8",
}


@pytest.mark.parametrize("command", WORDS)
def test_the_same_files(command, there):
    plain, found = both(command, *WORDS[command].split())
    assert files(found) == files(plain)
    assert json.loads((found / "summary.json").read_text())["run"]["world"] == 2


def test_what_is_wrong_is_said_once(there):
    done = together("evaluate", "x.npy", "x.npy", "--batch", "0", "--out", "wrong")
    assert done.returncode != 0
    assert done.stderr.count("scoresde evaluate: error: batch is 0") == 1
    assert done.stdout == ""
    assert not Path("wrong").exists()
