"""`scoresde train`: a configuration and a folder to a trained network; killed or interrupted, the same command goes on to the same end."""

from __future__ import annotations

import math
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from .parallel import ALONE, Group
from .resume import MEND, write_json
from .sections import tree_of
from .sharded import shard
from .store import clear, latest, locked, step_name, steps, write_file
from .train import Step
from .training import Training
from .watch import Watch

__all__ = ["average", "run"]

FREE = ("every", "samples", "data.workers", "compile", "device", "sharded", "tensorboard")  # what may change when a run goes on
OURS = (
    "checkpoints", "averages", "samples", "features", "tensorboard", "config.yaml", "environment.json", "fid.json", "loss.png",
    "validation.png", "summary.json", *(f"{n}.{s}" for n in ("metrics", "speed", "validation") for s in ("jsonl", "csv")),
)  # fmt: skip


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

    net, world = job.model.net, job.group.world
    return {
        "versions": {"scoresde": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": f"{job.config.device} ({platform.machine()}, {platform.system()}), {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if job.training.device.type == "cuda" else None,
        "processes": world, "mode": "one process" if world == 1 else "FSDP2" if job.config.sharded else "DistributedDataParallel",
        "network": type(net).__name__, "parameters": sum(p.numel() for p in net.parameters()), "sde": str(job.model.sde),
    }  # fmt: skip


@contextmanager
def _alone_in(folder: Path, group: Group) -> Iterator[None]:
    """The folder locked by the first process, for all of the group."""
    with ExitStack() as stack:
        group.by_first(lambda: stack.enter_context(locked(folder)))
        yield


@contextmanager
def _signals(group: Group) -> Iterator[list[int]]:
    """The numbers of the signals that have asked to stop: the first lets the step end, the second ends it there.

    Not in a group, where the terminal and torchrun both send what Ctrl-C is, and a step ends for all or for none.
    """
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked and group.world == 1:
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
    training, folder, tensors = job.training, folder / "averages", job.training.tensors()
    if job.group.first and training.step not in steps(folder):  # a run that was killed comes by here again, with the same averages
        widths = {e.name: e.std for e in training.emas if isinstance(e, PowerEMA)}
        config, state = job.described(), {"step": training.step, "widths": widths}
        checkpoint.write(folder, training.step, tensors, optimizer=None, config=config, state=state, keep=10**9)


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


def _save(job: Job, folder: Path, pending: list[float], logs: tuple[Log, ...], end: bool) -> str | None:
    """Write a checkpoint; return why it could not be written, which at the end is raised. In a group the first writes, for all."""
    training, step, group = job.training, job.training.step, job.group
    if group.any(not training.finite()):
        raise NonFiniteError(
            f"step {step}: a parameter, average or buffer is not finite, and no checkpoint is made of it; lower the rate"
        )
    tensors, moments = training.tensors(), training.moments()
    state = {
        **training.state(), "epoch": job.batches.epoch(step + 1), "position": job.batches.position(step + 1), "seed": job.config.seed,
        "pending": pending,
    }  # fmt: skip

    def write() -> str | None:
        try:
            for log in logs:
                log.flush()
            checkpoint.write(
                folder / "checkpoints", step, tensors, optimizer=moments, config=job.described(), state=state,
                keep=job.config.every.keep,
            )  # fmt: skip
        except OSError as error:
            if end:
                raise
            return str(error)
        return None

    return group.by_first(write)


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


def run(
    config: Config, folder: Path, *, overwrite: bool = False, say: Callable[[str], object] = print, group: Group = ALONE
) -> dict[str, Any]:
    """Train as `config` says, in `folder`; return the summary. What is there of the same configuration is gone on with.

    In the folder: config.yaml (resolved), environment.json, metrics.jsonl and .csv (a row every log steps, and what is measured),
    speed.jsonl, checkpoints/step-*, samples/, validation and loss figures, and summary.json when all steps are done. A signal (Ctrl-C,
    SIGTERM) ends it after a step, with a checkpoint. A checkpoint that cannot be written is said and tried again at the next.

    group: the processes that train together, which all call this alike and see the same folder; the first alone writes and says. A
    checkpoint does not know of them: the same folder may be gone on with by more or fewer, sharded or not. What the first does alone
    (learning features for a Frechet distance is the longest) must take less than the timeout of `scoresde.parallel.joined`.
    """
    if config.tensorboard:
        require_tensorboard()
    _agree(config, group)
    with _alone_in(folder, group), _signals(group) as asked:
        group.check_shared(folder)
        with group.in_turn():  # data that are fetched are fetched once a machine
            job = prepare(config, group)  # before anything of an earlier run is touched
        group.agree("the data", job.fingerprint)
        newest = group.by_first(lambda: _open(config, folder, overwrite))
        pending = list[float]()
        if newest is not None:
            found = checkpoint.read(newest)
            if any(found.config.get(key) != value for key, value in job.described().items()):
                raise FileExistsError(f"{newest} is of other data or another network than {config.data.source} now makes; {MEND}")
            pending = _resume(job.training, found)
            del found
        job.described()  # while the network is what it is called
        logs = _Unwritten(), _Unwritten(), _Unwritten()
        with group.in_turn():
            logs = _begin(job, folder) if group.first else logs
        if config.sharded:
            shard(job.training, group)
        if job.training.step and group.first:
            step, done = job.training.step, job.training.step == config.steps
            say(f"all {config.steps} steps are done" if done else f"going on after step {step} of {config.steps}")
        try:
            _loop(job, folder, logs, pending, asked)
        finally:
            logs[0].close()
        return group.by_first(lambda: _finish(job, folder, logs, say))


def _agree(config: Config, group: Group) -> None:
    """ValueError that says in what the configurations of the processes differ."""
    every = group.objects(_flat(tree_of(config)))
    keys = {k: None for each in every for k in each}
    differ = [key for key in keys if any(each.get(key) != every[0].get(key) for each in every)]
    group.agree("the configuration", "; ".join(f"{key}: {every[group.rank].get(key)}" for key in differ))


def _open(config: Config, folder: Path, overwrite: bool) -> Path | None:
    """Make the folder this run's; return the checkpoint it goes on from."""
    if overwrite:
        _clean(folder)
    _pin(config, folder)
    for left in (folder, folder / "features", folder / "samples"):
        if left.is_dir():
            clear(left)
    return latest(folder / "checkpoints")


def _begin(job: Job, folder: Path) -> tuple[Log, Log, Log]:
    """The logs of a run that goes on from the step where the training stands."""
    step = job.training.step
    if step < job.config.steps:  # else there is nothing to do
        (folder / "summary.json").unlink(missing_ok=True)  # it is of fewer steps, or of none
        write_json(folder / "environment.json", _environment(job))
    log = Log(folder, step=step, tensorboard=job.config.tensorboard)
    return log, Log(folder, "speed", step), Log(folder, "validation", step)


def _finish(job: Job, folder: Path, logs: tuple[Log, Log, Log], say: Callable[[str], object]) -> dict[str, Any]:
    """Tables, figures and summary of a run that has done all its steps."""
    log, speed, levels = logs
    summary = _summary(job, log, speed)
    for each in logs:
        if each.rows:
            each.table()
    try:
        reports.figures_of(folder, log.rows, levels.rows)
    except ModuleNotFoundError:
        warn("no figures without matplotlib: pip install 'scoresde[plots]'")
    write_json(folder / "summary.json", summary)
    words = ", ".join(f"{k} {v:.4f}" for k, v in summary.items() if isinstance(v, float))
    say(f"step {job.training.step}: {words}; {job.training.skipped} steps skipped; in {folder}/")
    return summary


class _Unwritten(Log):
    """The log of a process that is not the first."""

    def __init__(self) -> None:
        self.rows, self._writer = [], None

    def add(self, row: Any) -> None:
        """Nothing."""


def _loop(job: Job, folder: Path, logs: tuple[Log, Log, Log], pending: list[float], asked: list[int]) -> None:
    """All steps from where the training stands; `pending`: losses that no row of the log has yet."""
    config, every, group = job.config, job.config.every, job.group
    log, speed, levels = logs
    watch, clock = Watch(job, folder, log, levels), _Clock(job.training.step)
    quiet = clock.first == config.steps or not group.first
    bar = tqdm(total=config.steps, initial=clock.first, desc="train", unit="step", mininterval=1.0, disable=quiet)
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
            # Read once: a signal may come at any time, and to one process before another. A word of its own, not one with those of the
            # next step, whose batch would have been drawn for nothing; `fit` need not know of signals.
            stop = next((number for (number,) in group.numbers(*(asked[:1] or [0])) if number), 0)
            end = bool(stop) or n == config.steps
            if end or (every.checkpoint and n % every.checkpoint == 0):
                why = _save(job, folder, pending, (log, levels), end)
                if why is not None and group.first:
                    warn(f"the training goes on without a checkpoint of step {n}: {why}")
            if stop:
                if group.first:
                    warn(f"stopped after step {n}, which is in a checkpoint: the same command goes on")
                _end(stop)


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
