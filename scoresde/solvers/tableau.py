"""Where a single step puts its evaluations, and what it makes of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLASSIC", "MIDPOINT", "OF_ORDER", "THIRDS", "TRAPEZOID", "Tableau"]


@dataclass(frozen=True)
class Tableau:
    """The evaluations inside one step. `fractions`: where they sit in the step, the first at 0; then one of

    through: for evaluation 1, 2, ... and last for the end, the earlier evaluations whose interpolant makes it;
    shares: the same, as weights of all the earlier evaluations in units of the step of u (then the fractions are of u).
    """

    order: int
    fractions: tuple[float, ...]
    through: tuple[tuple[int, ...], ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        rows = self.through or self.shares
        if (
            not self.fractions
            or self.fractions[0] != 0
            or bool(self.through) == bool(self.shares)
            or len(rows) != len(self.fractions)
        ):
            raise ValueError(
                f"fractions is {self.fractions}, {len(rows)} rows in through or shares; wanted the first fraction 0 and one row an "
                "evaluation, in one of the two"
            )
        wrong = [
            i for i, row in enumerate(rows) if (len(row) != i + 1 if self.shares else not row or not set(row) <= set(range(i + 1)))
        ]
        sums = [abs(sum(row) - end) for row, end in zip(self.shares, (*self.fractions[1:], 1.0), strict=False)]
        if sums and max(sums) > 1e-12:
            i = sums.index(max(sums))
            end = (*self.fractions[1:], 1.0)[i]
            raise ValueError(f"row {i} of shares is {self.shares[i]}; wanted weights that add to where it ends: {end}")
        if wrong:
            raise ValueError(f"row {wrong[0]} of the tableau is {rows[wrong[0]]}; wanted it made of the evaluations before it")


MIDPOINT = Tableau(2, (0.0, 1 / 2), ((0,), (1,)))
TRAPEZOID = Tableau(2, (0.0, 1.0), ((0,), (0, 1)))
THIRDS = Tableau(3, (0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 2)))
CLASSIC = Tableau(4, (0.0, 1 / 2, 1 / 2, 1.0), shares=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
OF_ORDER = {1: Tableau(1, (0.0,), ((0,),)), 2: MIDPOINT, 3: THIRDS, 4: CLASSIC}  # where an order is all that is given
