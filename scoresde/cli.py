"""The command line: `scoresde train`, `sample`, `likelihood` and `evaluate`, each also under torchrun, and `scoresde demo`."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from . import __version__
from .command import DeviceError, place, said, tag
from .parallel import Elsewhere, joined

__all__ = ["main"]

LINGER = 10.0  # seconds at most
HEED = 3.0  # seconds in which the first process may say first what all have to say
TOGETHER = "It also runs under torchrun, on many processes, with the same result."


@dataclass(frozen=True)
class Train:
    """Train a model as a configuration says; killed or interrupted, the same command goes on.

    It also runs under torchrun, on many processes, with the same result.
    """

    config: Path
    """the configuration: YAML, JSON or TOML, of which data: {source: digits} is a whole one"""
    set: tuple[tuple[str, ...], ...] = ()
    """KEY=VALUE, as in optimizer.lr=1e-3: in place of what the configuration says; several, here or by repeating"""
    out: Path | None = None
    """folder of the run (None: runs/, then the name of the configuration)"""
    overwrite: bool = False
    """drop what a run has left in the folder instead of going on with it"""


@dataclass(frozen=True)
class Sample:
    """Samples of a saved model, a seed a sample; killed or interrupted, the same command goes on.

    It also runs under torchrun, on many processes, with the same result.
    """

    folder: Path
    """the model: a folder of a training, or as scoresde.checkpoint.save wrote it"""
    out: Path = Path("runs/samples")
    """folder of the samples, their table, their summary and a picture of the first"""
    seeds: str = "0-63"
    """numbers and ranges: 0-4999 or 0,5,7-9; a sample is a function of its seed"""
    nfe: int | None = None
    """at most this many evaluations a sample (None: 35)"""
    steps: int | None = None
    """steps a sample, in place of nfe"""
    solver: str | None = None
    """NAME[:ARGUMENT...], as in Heun, DPMSolverPP:order=3 or Churn:Heun:40 (None: the library chooses)"""
    labels: str | None = None
    """one class for all, or cycle: seed modulo classes"""
    weights: str | None = None
    """which, of a model that has several, such as ema_0.999"""
    format: Literal["png", "npz"] | None = None
    """a PNG a sample, or an npz a batch (None: png, of images)"""
    subdirs: bool | None = None
    """a folder for each thousand PNG files (None: beyond 10,000)"""
    levels: int = 256
    """grey levels of images"""
    low: float | None = None
    """lower end of the model's range (None: the training's, else -1)"""
    high: float | None = None
    """its upper end (None: the training's, else 1)"""
    batch: int = 64
    """samples the network sees at once"""
    processes: int = 1
    """batches at work at once, a thread each"""
    dtype: Literal["float32", "float64"] = "float32"
    """of the state"""
    device: str = "cpu"
    """of each process"""
    overwrite: bool = False
    """drop what a run has left in the folder instead of going on with it"""


@dataclass(frozen=True)
class Evaluate:
    """Metrics of samples against a reference; killed or interrupted, the same command goes on.

    Either is a folder that `scoresde sample` wrote, a folder of images, .npy, the name of a set, or statistics (.npz of mu and sigma).
    It also runs under torchrun, on many processes, with the same result.
    """

    samples: str
    """SAMPLES: what is to be judged"""
    reference: str
    """REFERENCE: the data it is to be like"""
    out: Path = Path("runs/evaluate")
    """folder of the summary and of the statistics of both"""
    features: str = "pixels"
    """pixels, or a folder of features such as features/ of a training"""
    part: str | None = None
    """of a reference that is a named set: train or test (None: train)"""
    count: int | None = None
    """the first so many samples (None: all)"""
    levels: int | None = None
    """grey levels of .npy files of integers (None: those of the other set, else 256)"""
    low: float | None = None
    """lower end of the model's range, which integers are brought to (None: that of the samples, else -1)"""
    high: float | None = None
    """its upper end (None: that of the samples, else 1)"""
    batch: int = 64
    """images whose features are computed at once"""
    processes: int = 1
    """units of 1024 images at work at once, a thread each"""
    device: str = "cpu"
    """of the features"""
    overwrite: bool = False
    """drop what a run has left in the folder instead of going on with it"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when it is done, 1 when it failed, 2 for wrong usage, 130 when interrupted, 143 when told to end."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    rank, world = place()
    try:
        if words and words[0] in TYPED:
            with _ending():
                TYPED[words[0]](words[1:])
            return 0
        with _by_first():
            chosen = _parser().parse_args(words)
        if chosen.command == "demo" and world > 1:
            _refuse("demo", ValueError(f"demo is of one process and torchrun has started {world}; run it without torchrun"))
        with _ending():
            chosen.run(chosen)
    except Elsewhere:
        _linger(1)
        return 1
    except SystemExit as end:
        if rank and end.code == 2:  # which the first says
            _linger(2)
        raise
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr)
        return 130
    except (ArithmeticError, MemoryError, ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        if rank:  # where the first has the same error, it alone says so
            _linger(1, HEED)
        print(f"scoresde: {tag()}{said(error)}", file=sys.stderr)
        return 1
    return 0


def _linger(code: int, seconds: float | None = None) -> None:
    """Give the process that has failed time to say why: torchrun ends all others as soon as one of them has ended."""

    def end(*_: object) -> NoReturn:
        raise SystemExit(code)

    with _ending(end):
        time.sleep(LINGER if seconds is None else seconds)


@contextmanager
def _by_first() -> Iterator[None]:
    """What the block prints, of many processes by the first alone: all of them read the same words."""
    with ExitStack() as stack:
        if place()[0]:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scoresde", description="Continuous-time score-based diffusion: any SDE, any solver.")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, options in (("train", Train), ("sample", Sample), ("evaluate", Evaluate)):
        commands.add_parser(name, help=str(options.__doc__).splitlines()[0].rstrip("."), add_help=False)
    demo = commands.add_parser("demo", help="train, sample, score and compare on 8x8 digits, into a folder of tables and figures")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    demo.add_argument(
        "--full", action="store_true", help="every row: the SDE samplers at 200 evaluations too, Euler-Maruyama at 1000"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the networks and the classifier (default: %(default)s)")
    demo.set_defaults(run=_demo)
    _add_likelihood(commands)
    return parser


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)


@contextmanager
def _ending(end: Callable[..., object] = _terminated) -> Iterator[None]:
    """A SIGTERM ends the work as Ctrl-C does, files closed, workers stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _typed(command: str, options: Any, words: Sequence[str], description: str | None = None) -> Any:
    """The options of a command, by tyro; exit 2, with its words, for wrong ones."""
    import tyro

    conf = tyro.conf
    markers = (conf.PositionalRequiredArgs, conf.UseAppendAction, conf.FlagCreatePairsOff, conf.DisallowNone)
    with _by_first():
        return tyro.cli(options, prog=f"scoresde {command}", description=description, args=words, config=markers)


def _refuse(command: str, error: Exception) -> NoReturn:
    """Wrong usage: the first process says it, of a device that a machine has not the first of that machine."""
    rank, _ = place()
    own = isinstance(error, DeviceError) and os.environ.get("LOCAL_RANK") == "0"
    if rank == 0 or own:
        print(f"scoresde {command}: error: {tag() if rank else ''}{error}", file=sys.stderr)
    raise SystemExit(2) from error


def _afresh(overwrite: bool) -> bool:
    """Whether to drop what is there: not what this job has done before torchrun started its processes again."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return overwrite and not (again.isdecimal() and int(again) > 0)


def _train(words: Sequence[str]) -> None:
    from .config import Config, load
    from .sections import describe

    chosen = _typed("train", Train, words, f"{inspect.cleandoc(str(Train.__doc__))}\n\nKeys and defaults:\n\n{describe(Config)}")
    try:
        config = load(chosen.config, [text for several in chosen.set for text in several])
    except (OSError, TypeError, ValueError) as error:
        _refuse("train", error)
    from .run import run

    out = Path("runs") / chosen.config.stem if chosen.out is None else chosen.out
    with joined(config.device) as group:
        run(config, out, overwrite=_afresh(chosen.overwrite), group=group)


def _sample(words: Sequence[str]) -> None:
    chosen = _typed("sample", Sample, words)
    from .checks import check_count
    from .generate import Settings, parse_seeds, run

    values = {field.name: getattr(chosen, field.name) for field in fields(Settings)}
    try:
        values["seeds"] = parse_seeds(chosen.seeds)
        if chosen.labels is not None and chosen.labels.isdecimal():
            values["labels"] = int(chosen.labels)
        settings = Settings(**values)
        check_count(chosen.processes, "processes")
    except (TypeError, ValueError) as error:
        _refuse("sample", error)
    with joined(settings.device) as group:
        run(chosen.folder, chosen.out, settings, processes=chosen.processes, overwrite=_afresh(chosen.overwrite), group=group)


def _evaluate(words: Sequence[str]) -> None:
    chosen = _typed("evaluate", Evaluate, words)
    from .checks import check_count
    from .evaluate import Settings, run

    try:
        if not chosen.samples or not chosen.reference:
            raise ValueError("SAMPLES or REFERENCE is empty; wanted a folder, a .npy or .npz file or the name of a set")
        settings = Settings(**{field.name: getattr(chosen, field.name) for field in fields(Settings)})
        check_count(chosen.processes, "processes")
    except (TypeError, ValueError) as error:
        _refuse("evaluate", error)
    how = {"processes": chosen.processes, "overwrite": _afresh(chosen.overwrite)}
    with joined(settings.device) as group:
        run(chosen.samples, chosen.reference, chosen.out, settings, **how, group=group)


TYPED: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "sample": _sample, "evaluate": _evaluate}


def _demo(chosen: argparse.Namespace) -> None:
    from .demo import FULL, Settings, run  # the imports of a command are paid when it runs

    run(chosen.out, replace(FULL if chosen.full else Settings(), seed=chosen.seed), overwrite=chosen.overwrite)


def _add_likelihood(commands: Any) -> None:
    text = "bits/dim of integer images under a saved model, a row an image; killed or interrupted, the same command goes on"
    command = commands.add_parser("likelihood", help=text, description=f"{text}. {TOGETHER}")
    add, default, whole = command.add_argument, " (default: %(default)s)", _at_least
    add("folder", type=Path, metavar="FOLDER", help="the model: a folder of a training, or as scoresde.checkpoint.save wrote it")
    add("data", type=Path, metavar="DATA", help=".npy of integers [N, *shape], or a folder of image files, in the order of names")
    add("--out", type=Path, default=Path("runs/likelihood"), help="folder of table, summary and histogram" + default)
    trained = " (default: the training's, else {})".format
    add("--levels", type=whole(2), metavar="N", help="grey levels of the images, 0 .. N - 1" + trained(256))
    add("--low", type=float, metavar="X", help="lower end of the model's range" + trained(-1))
    add("--high", type=float, metavar="X", help="its upper end" + trained(1))
    add("--dequantization", choices=["uniform", "truncated-normal"], default="uniform", help="noise in a cell" + default)
    add("--importance", type=whole(1), metavar="K", help="log-mean-exp of K draws of it: a tighter bound")
    add("--samples", type=whole(1), default=1, metavar="K", help="bounds to average, for their spread" + default)
    budget = command.add_mutually_exclusive_group()
    budget.add_argument("--nfe", type=whole(1), metavar="N", help="at most N evaluations a solve")
    budget.add_argument("--steps", type=whole(1), metavar="N", help="N steps a solve")
    budget.add_argument("--tolerance", type=float, metavar="TOL", help="Dopri5(TOL, TOL); given none, the library chooses")
    kinds = "exact, rademacher:K, gaussian:K, coloured:K[:CHAINS] or hutchpp:K[:CHAINS]"
    least = " (default: exact up to 256 numbers an image, coloured:2:2 beyond)"
    add("--divergence", type=_divergence, metavar="NAME", help=kinds + least)
    add("--batch", type=whole(1), default=64, metavar="N", help="images the network sees at once" + default)
    add("--first", type=whole(0), default=0, metavar="I", help="index of the first image" + default)
    add("--count", type=whole(1), metavar="N", help="how many images (default: all from the first on)")
    add("--processes", type=whole(1), default=1, metavar="P", help="batches at work at once, a thread each" + default)
    add("--seed", type=whole(0), default=0, metavar="S", help="image i draws from the seed 2^32 S + i" + default)
    add("--dtype", choices=["float32", "float64"], default="float32", help="of the state" + default)
    add("--device", default="cpu", help="of each process" + default)
    add("--overwrite", action="store_true", help="drop what a run has left in the folder instead of going on with it")
    command.set_defaults(run=_likelihood, refuse=command.error)


def _likelihood(chosen: argparse.Namespace) -> None:
    from .densities import Settings, run

    values = vars(chosen)
    try:
        settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    except DeviceError as error:
        _refuse("likelihood", error)
    except (TypeError, ValueError) as error:
        with _by_first():
            chosen.refuse(str(error))
        raise
    how = {name: values[name] for name in ("first", "count", "processes")} | {"overwrite": _afresh(chosen.overwrite)}
    with joined(settings.device) as group:
        run(chosen.folder, chosen.data, chosen.out, settings, **how, group=group)


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {low}")
        return int(text)

    return number


def _divergence(text: str) -> Any:
    from .densities import parse_divergence

    try:
        return parse_divergence(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
