"""Where a single step puts its evaluations, and what it makes of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLASSIC", "DOPRI5", "DOPRI8", "MIDPOINT", "OF_ORDER", "THIRDS", "TRAPEZOID", "Tableau"]


@dataclass(frozen=True)
class Tableau:
    """The evaluations inside one step. `fractions`: where they sit in the step, the first at 0; then one of

    through: for evaluation 1, 2, ... and last for the end, the earlier evaluations whose interpolant makes it;
    shares: the same, as weights of all the earlier evaluations in units of the step of u (then the fractions are of u).

    lower: one more row for the end, of order `order` - 1, with which the step's error is estimated; shares may have one more entry,
    for the evaluation at the end itself, which is then the next step's first.
    """

    order: int
    fractions: tuple[float, ...]
    through: tuple[tuple[int, ...], ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    lower: tuple[float, ...] = ()

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
        n = len(self.fractions)
        if self.lower and (
            len(self.lower) not in (n, n + 1) or abs(sum(self.lower) - 1) > 1e-12
            if self.shares
            else not set(self.lower) <= set(range(n))
        ):
            raise ValueError(
                f"lower is {self.lower}; wanted {n} or {n + 1} weights that add to 1, or with through some of 0 to {n - 1}"
            )
        if self.lower and self.lower[:n] == rows[-1] and not any(self.lower[n:]):
            raise ValueError(
                f"lower is {self.lower}, the row of the end itself: the error would read 0; wanted that of a lower order"
            )
        sums = [abs(sum(row) - end) for row, end in zip(self.shares, (*self.fractions[1:], 1.0), strict=False)]
        if sums and max(sums) > 1e-12:
            i = sums.index(max(sums))
            end = (*self.fractions[1:], 1.0)[i]
            raise ValueError(f"row {i} of shares is {self.shares[i]}; wanted weights that add to where it ends: {end}")
        if wrong:
            raise ValueError(f"row {wrong[0]} of the tableau is {rows[wrong[0]]}; wanted it made of the evaluations before it")


MIDPOINT = Tableau(2, (0.0, 1 / 2), ((0,), (1,)), lower=(0,))
TRAPEZOID = Tableau(2, (0.0, 1.0), ((0,), (0, 1)), lower=(0,))
THIRDS = Tableau(3, (0.0, 1 / 3, 2 / 3), ((0,), (0, 1), (0, 2)), lower=(0, 1))
CLASSIC = Tableau(4, (0.0, 1 / 2, 1 / 2, 1.0), shares=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
OF_ORDER = {1: Tableau(1, (0.0,), ((0,),)), 2: MIDPOINT, 3: THIRDS, 4: CLASSIC}  # what a solver that names an order alone means

# Dormand & Prince 1980 (J. Comput. Appl. Math. 6), 5(4), and Prince & Dormand 1981 (7), 8(7) with 13 stages.
DOPRI5 = Tableau(
    5,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    shares=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    lower=(5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
)
# fmt: off
DOPRI8 = Tableau(
    8,
    (0.0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20, 1201146811 / 1299019798, 1.0, 1.0),
    shares=(
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (16016141 / 946692911, 0.0, 0.0, 61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229, -180193667 / 1043307555),
        (39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301, 100302831 / 723423059, 790204164 / 839813087,
         800635310 / 3783071287),
        (246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803, -12992083 / 490766935,
         6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789),
        (-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823, -10304129995 / 1701304382,
         -48777925059 / 3047939560, 15336726248 / 1032824649, -45442868181 / 3398467696, 3065993473 / 597172653),
        (185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517, -703635378 / 230739211,
         5731566787 / 1027545527, 5232866602 / 850066563, -4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083),
        (403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805, 652783627 / 914296604,
         11173962825 / 925320556, -13158990841 / 6184727034, 3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0.0),
        (14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731, 561292985 / 797845732,
         -1041891430 / 1371343529, 760417239 / 1151165299, 118820643 / 751138087, -528747749 / 2220607170, 1 / 4),
    ),
    lower=(13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321, 656045339 / 265891186,
           -3867574721 / 1518517206, 465885868 / 322736535, 53011238 / 667516719, 2 / 45, 0.0),
)
# fmt: on
