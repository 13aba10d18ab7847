"""Seeds as text: numbers and ranges, held as ranges."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Seeds", "parse_seeds"]


@dataclass(frozen=True)
class Seeds:
    """Seeds in [0, 2^64): ranges that rise and do not touch, so that a billion of them cost nothing to hold."""

    ranges: tuple[range, ...]

    @property
    def count(self) -> int:
        """How many they are; `len` would stop at 2^63."""
        return sum(part.stop - part.start for part in self.ranges)

    def __contains__(self, seed: int) -> bool:
        return any(seed in part for part in self.ranges)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.ranges)

    def __str__(self) -> str:
        return ",".join(f"{p.start}-{p.stop - 1}" if p.stop - p.start > 1 else str(p.start) for p in self.ranges)


def parse_seeds(text: str) -> Seeds:
    """The seeds that numbers and ranges with commas between them mean, ends included: 0-4999 or 0,5,7-9, in any order."""
    parts = []
    for word in text.split(","):
        found = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", word.strip())
        if not found:
            raise ValueError(f"seeds are {text!r}; wanted numbers and ranges such as 0-4999 or 0,5,7-9, not {word.strip()!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < 2**64:
            raise ValueError(f"seeds are {text!r}; wanted ranges that rise and end below 2^64, not {word.strip()}")
        parts.append((first, last + 1))
    merged: list[list[int]] = []
    for start, stop in sorted(parts):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return Seeds(tuple(range(*ends) for ends in merged))
