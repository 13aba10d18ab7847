"""Seeds as text: numbers and ranges, held as ranges."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Seeds", "parse_seeds"]


@dataclass(frozen=True)
class Seeds:
    """Seeds in [0, 2^64): ranges that rise and do not touch, so that a billion of them cost nothing to hold."""

    ranges: tuple[range, ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[int, int]]) -> Seeds:
        """Those of the intervals [start, stop), in any order."""
        merged: list[list[int]] = []
        for start, stop in sorted(parts):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            elif start < stop:
                merged.append([start, stop])
        return cls(tuple(range(*ends) for ends in merged))

    @property
    def count(self) -> int:
        """How many they are; `len` would stop at 2^63."""
        return sum(part.stop - part.start for part in self.ranges)

    def within(self, start: int, stop: int) -> Seeds:
        """Those in [start, stop)."""
        first = bisect.bisect_right(self.ranges, start, key=lambda part: part.stop)
        last = bisect.bisect_left(self.ranges, stop, key=lambda part: part.start)
        return Seeds(tuple(range(max(part.start, start), min(part.stop, stop)) for part in self.ranges[first:last]))

    def without(self, others: Seeds) -> Seeds:
        """Those that are not among the others."""
        left = []
        for part in self.ranges:
            start = part.start
            for other in others.within(part.start, part.stop).ranges:
                left.append((start, other.start))
                start = other.stop
            left.append((start, part.stop))
        return Seeds.of(left)

    def at(self, first: int, stop: int) -> Iterator[int]:
        """The seeds number first .. stop - 1, counted from 0 in rising order."""
        for part in self.ranges:
            size = part.stop - part.start
            yield from range(part.start + min(max(first, 0), size), part.start + min(max(stop, 0), size))
            first, stop = first - size, stop - size

    def __contains__(self, seed: int) -> bool:
        at = bisect.bisect_right(self.ranges, seed, key=lambda part: part.stop)
        return at < len(self.ranges) and seed in self.ranges[at]

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
    return Seeds.of(parts)
