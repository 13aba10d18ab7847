"""The command line: `scoresde demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when it is done, 1 when it failed, 2 for wrong usage, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="scoresde", description="Continuous-time score-based diffusion: any SDE, any solver.")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train, sample, score and compare on 8x8 digits, into a folder of tables and figures")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    demo.add_argument(
        "--full", action="store_true", help="every row: the SDE samplers at 200 evaluations too, Euler-Maruyama at 1000"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the networks and the classifier (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    from .demo import FULL, Settings, run  # the imports of a command are paid when it runs

    try:
        run(chosen.out, replace(FULL if chosen.full else Settings(), seed=chosen.seed), overwrite=chosen.overwrite)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ArithmeticError, ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"scoresde: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
