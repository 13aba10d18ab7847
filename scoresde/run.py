"""`scoresde train`: a configuration and a folder to a trained network; killed or interrupted, the same command goes on to the same end."""

from __future__ import annotations

import math
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, reports
from . import config as configs
from .checks import NonFiniteError, check_number
from .command import warn
from .config import Config
from .data import prefetched
from .denoiser import Preconditioned
from .ema import PowerEMA, posthoc
from .job import Job, prepare
from .logs import Log, require_tensorboard
from .resume import write_json
from .sections import tree_of
from .store import clear, latest, locked, step_name, steps, write_file
from .train import Step
from .training import Training
from .watch import Watch

__all__ = ["average", "run"]

FREE = ("every", "samples", "data.workers", "compile", "device", "tensorboard")  # what may change when a run goes on
OURS = (
    "checkpoints", "averages", "samples", "features", "tensorboard", "config.yaml", "environment.json", "fid.json", "loss.png",
    "validation.png", "summary.json", *(f"{n}.{s}" for n in ("metrics", "speed", "validation") for s in ("jsonl", "csv")),
)  # fmt: skip
MEND = "choose another --out, or pass --overwrite to start afresh"


def _end(number: int) -> NoReturn:
    """Leave as this signal asks: what Ctrl-C raises, or the exit status of the others."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


# --- the folder of a run -------------------------------------------------------------------------------------------------
def _pin(config: Config, folder: Path) -> None:
    """Keep the resolved configuration in config.yaml; FileExistsError that says what differs from a run that is there."""
    path = folder / "config.yaml"
    if path.exists():
        try:
            before = configs.load(path)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what a run writes ({error}); {MEND}") from error
        was, now = _flat(tree_of(before)), _flat(tree_of(config))
        changed = [key for key in {**was, **now} if was.get(key) != now.get(key) and not key.startswith(FREE)]
        if config.decay == "none" and "steps" in changed:
            changed.remove("steps")  # a longer training begins as a shorter one
        if changed:
            differs = "; ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in changed)
            free = f"{', '.join(FREE)} and, with decay: none, steps may change"
            raise FileExistsError(f"{folder} holds a run of another configuration: {differs}. {MEND}; {free}")
    else:
        _check_ours(folder)
    write_file(path, configs.dump(config).encode())


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{path}.{name}" if path else name).items()}


def _check_ours(folder: Path) -> None:
    if any((folder / name).exists() for name in OURS):
        raise FileExistsError(f"{folder} holds a run and no config.yaml to say which; choose another --out")


def _clean(folder: Path) -> None:
    """Remove a run; what lies in a folder without a config.yaml is not ours to remove."""
    if not (folder / "config.yaml").exists():
        _check_ours(folder)
    for name in OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _environment(job: Job) -> dict[str, Any]:
    from . import __version__

    net = job.model.net
    return {
        "versions": {"scoresde": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": f"{job.config.device} ({platform.machine()}, {platform.system()}), {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if job.training.device.type == "cuda" else None,
        "network": type(net).__name__, "parameters": sum(p.numel() for p in net.parameters()), "sde": str(job.model.sde),
    }  # fmt: skip


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that have asked to stop: the first lets the step end, the second ends it there."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked:
            _end(number)
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


# --- checkpoints --------------------------------------------------------------------------------------------------------
def _store(job: Job, folder: Path) -> None:
    """The averages of this step, for good: what an average of another length is made of afterwards."""
    training, folder = job.training, folder / "averages"
    if training.step not in steps(folder):  # a run that was killed comes by here again, with the same averages
        widths = {e.name: e.std for e in training.emas if isinstance(e, PowerEMA)}
        config, state = job.described(), {"step": training.step, "widths": widths}
        checkpoint.write(folder, training.step, training.tensors(), optimizer=None, config=config, state=state, keep=10**9)


def average(folder: Path, std: float, step: int | None = None) -> Preconditioned:
    """A power average of any std from those that a run has stored (every.average), at `step` (default the last stored), in eval mode.

    Two widths stored some ten times or more serve, as ema: [{std: 0.05}, {std: 0.1}] with every.average a tenth of the steps. Raises
    ValueError for a folder without any. See `scoresde.ema.posthoc`. Karras et al. 2024 (CVPR), section 3.2.
    """
    found = [checkpoint.read(path) for n, path in steps(Path(folder) / "averages").items() if step is None or n <= step]
    stored = [(each.step, std, each.tensors[name]) for each in found for name, std in each.state["widths"].items()]
    widths = {each[1] for each in stored}
    if len(widths) < 2:
        raise ValueError(
            f"{folder} has stored power averages of {len(widths)} widths; wanted two, of a run with ema: [{{std: 0.05}}, {{std: 0.1}}] and "
            "every.average"
        )
    model = checkpoint.load(found[-1].path)
    model.net.load_state_dict(posthoc(stored, std, step))
    return model


def _save(job: Job, folder: Path, pending: list[float]) -> None:
    training, step = job.training, job.training.step
    if not training.finite():
        raise NonFiniteError(
            f"step {step}: a parameter, average or buffer is not finite, and no checkpoint is made of it; lower the rate"
        )
    state = {
        **training.state(), "epoch": job.batches.epoch(step + 1), "position": job.batches.position(step + 1), "seed": job.config.seed,
        "pending": pending,
    }  # fmt: skip
    checkpoint.write(
        folder / "checkpoints", step, training.tensors(), optimizer=training.optimizer.state_dict(), config=job.described(), state=state,
        keep=job.config.every.keep,
    )  # fmt: skip


def _resume(training: Training, found: checkpoint.Snapshot) -> list[float]:
    """Set the training to a checkpoint; return the losses that no row of the log has yet. ValueError names the checkpoint."""
    try:
        pending = [check_number(v, "a loss of pending") for v in found.state["pending"]]
        if found.optimizer is None or step_name(found.step) != found.path.name or isinstance(found.step, bool):
            raise ValueError("it is of no training, or of another step")
        training.restore(found.tensors, found.state, found.optimizer)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{found.path} cannot be gone on with: {error}; {MEND}") from error
    return pending


def run(config: Config, folder: Path, *, overwrite: bool = False, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train as `config` says, in `folder`; return the summary. What is there of the same configuration is gone on with.

    In the folder: config.yaml (resolved), environment.json, metrics.jsonl and .csv (a row every log steps, and what is measured),
    speed.jsonl, checkpoints/step-*, samples/, validation and loss figures, and summary.json when all steps are done. A signal (Ctrl-C,
    SIGTERM) ends it after a step, with a checkpoint. A checkpoint that cannot be written is said and tried again at the next.
    """
    if config.tensorboard:
        require_tensorboard()
    with locked(folder), _signals() as asked:
        job = prepare(config)  # before anything of an earlier run is touched
        if overwrite:
            _clean(folder)
        _pin(config, folder)
        for left in (folder, folder / "features", folder / "samples"):
            if left.is_dir():
                clear(left)
        training, pending = job.training, list[float]()
        newest = latest(folder / "checkpoints")
        if newest is not None:
            found = checkpoint.read(newest)
            if any(found.config.get(key) != value for key, value in job.described().items()):
                raise FileExistsError(f"{newest} is of other data or another network than {config.data.source} now makes; {MEND}")
            pending = _resume(training, found)
        if training.step < config.steps:
            (folder / "summary.json").unlink(missing_ok=True)  # it is of fewer steps, or of none
        write_json(folder / "environment.json", _environment(job))
        log = Log(folder, step=training.step, tensorboard=config.tensorboard)
        speed, levels = Log(folder, "speed", training.step), Log(folder, "validation", training.step)
        if training.step:
            done = training.step == config.steps
            say(f"all {config.steps} steps are done" if done else f"going on after step {training.step} of {config.steps}")
        try:
            _loop(job, folder, (log, speed, levels), pending, asked)
        finally:
            log.close()
        summary = _summary(job, log, speed)
        for each in (log, speed, levels):
            if each.rows:
                each.table()
        try:
            reports.figures_of(folder, log.rows, levels.rows)
        except ModuleNotFoundError:
            warn("no figures without matplotlib: pip install 'scoresde[plots]'")
        write_json(folder / "summary.json", summary)
        words = ", ".join(f"{k} {v:.4f}" for k, v in summary.items() if isinstance(v, float))
        say(f"step {training.step}: {words}; {training.skipped} steps skipped; in {folder}/")
        return summary


def _loop(job: Job, folder: Path, logs: tuple[Log, Log, Log], pending: list[float], asked: list[int]) -> None:
    """All steps from where the training stands; `pending`: losses that no row of the log has yet."""
    config, every = job.config, job.config.every
    log, speed, levels = logs
    watch, clock = Watch(job, folder, log, levels), _Clock(job.training.step)
    bar = tqdm(
        total=config.steps, initial=clock.first, desc="train", unit="step", mininterval=1.0, disable=clock.first == config.steps
    )
    with prefetched(job.batches, config.data.workers) as batches, bar:
        for step in job.fit(batches):
            n = step.step
            bar.update()
            pending += [step.loss] if every.log and not step.skipped else []
            if every.log and n % every.log == 0:
                row = _row(job, step, pending)
                log.add(row)
                speed.add(clock(n))
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                pending.clear()
            watch(n)
            if every.average and n % every.average == 0:  # before the checkpoint: a run goes on after it
                try:
                    _store(job, folder)
                except (OSError, ValueError) as error:
                    warn(f"the training goes on without stored averages of step {n}: {error}")
            stop = asked[:1]  # read once: a signal may come at any time
            end = bool(stop) or n == config.steps
            if end or (every.checkpoint and n % every.checkpoint == 0):
                try:
                    log.flush()
                    levels.flush()
                    _save(job, folder, pending)
                except OSError as error:
                    if end:
                        raise
                    warn(f"the training goes on without a checkpoint of step {n}: {error}")
            if stop:
                warn(f"stopped after step {n}, which is in a checkpoint: the same command goes on")
                _end(stop[0])


def _row(job: Job, step: Step, losses: list[float]) -> dict[str, Any]:
    """Of the log: nothing in it depends on when and where the run was stopped."""
    return {
        "step": step.step, "epoch": job.batches.epoch(step.step), "loss": math.fsum(losses) / len(losses) if losses else math.nan,
        "grad_norm": step.grad_norm, "lr": step.lr, "skipped": job.training.skipped,
    }  # fmt: skip


class _Clock:
    """Seconds of this sitting, and the pace since the last reading."""

    def __init__(self, first: int) -> None:
        self.first = self.step = first
        self.started = self.read = time.perf_counter()

    def __call__(self, step: int) -> dict[str, Any]:
        now = time.perf_counter()
        row = {
            "step": step,
            "seconds": round(now - self.started, 3),
            "steps_per_second": round((step - self.step) / (now - self.read), 4),
        }
        self.step, self.read = step, now
        return row


def _summary(job: Job, log: Log, speed: Log) -> dict[str, Any]:
    training, seconds = job.training, math.fsum(_sittings([r["seconds"] for r in speed.rows]))
    names = dict.fromkeys(k for r in log.rows for k in r if k == "loss" or k == "validation_loss" or k.startswith("fid@"))
    last = {name: next(r[name] for r in reversed(log.rows) if r.get(name, name) != name) for name in names}
    return {
        "step": training.step, "skipped": training.skipped, "epochs": round(training.step * job.config.batch / len(job.source), 3), **last,
        "seconds": round(seconds, 1), "checkpoint": f"checkpoints/{step_name(training.step)}",
        "weights": training.emas[0].name if training.emas else "model",
    }  # fmt: skip


def _sittings(seconds: list[float]) -> list[float]:
    """The last clock reading of each sitting: a run that goes on starts its clock anew."""
    return [a for a, b in pairwise([*seconds, -1.0]) if b < a]
