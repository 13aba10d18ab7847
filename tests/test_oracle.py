"""The oracle: what it counts, checks and cleans up after itself."""

import pytest
import torch
from laws import D, mixture
from torch import nn

import scoresde as s
from scoresde import Oracle
from scoresde.noise import seeded
from scoresde.solve import solve

VP = s.VP()
T = torch.tensor(0.5, dtype=D)
X = seeded(range(4)).initial((4, 2), D)


class Twice(s.Denoiser):
    """A guidance: it asks its inner denoiser twice. The arguments may come by name."""

    def __init__(self, inner, named=False):
        super().__init__(inner.sde)
        self.inner, self.named = inner, named

    def forward(self, x, t):
        again = self.inner(x=x, t=t) if self.named else self.inner(x, t)
        return 1.5 * self.inner(x, t) - 0.5 * again


class Rows(s.Denoiser):
    """A per-sample shift: `select` must follow the rows."""

    def __init__(self, shift):
        super().__init__(VP)
        self.register_buffer("shift", shift)
        self.seen = 0

    def forward(self, x, t):
        self.seen += len(x)
        return 0.5 * x + self.shift

    def select(self, index):
        return Rows(self.shift[index])


class Broken(s.Denoiser):
    def __init__(self, inner, after):
        super().__init__(inner.sde)
        self.inner, self.after = inner, after

    def forward(self, x, t):
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return self.inner(x, t)


def hooks(denoiser):
    return sum(len(m._forward_hooks) for m in denoiser.modules()), sum(
        len(m.recorders) for m in denoiser.modules() if isinstance(m, s.Denoiser)
    )


# --- asking --------------------------------------------------------------------------------------------------------------
def test_an_oracle_answers_as_its_denoiser_and_counts():
    denoiser = mixture(VP)
    oracle = Oracle(denoiser, 4)
    for i in range(3):
        p = oracle(X, T)
        assert torch.equal(p.x0, denoiser(X, T))
        assert torch.equal(p.eps, denoiser.predict(X, T).eps)
        assert oracle.nfe.tolist() == [i + 1] * 4
        assert oracle.ledger["score"] == i + 1
    assert oracle.predict == oracle.__call__
    assert torch.equal(s.flow(oracle, X, T), s.flow(denoiser, X, T))
    assert oracle.nfe.tolist() == [4] * 4
    assert oracle.sde is VP


@pytest.mark.parametrize("bad", [0.0, 0.5e-3, 1.001, -1.0, float("nan"), float("inf")])
def test_times_outside_are_refused_before_they_are_counted(bad):
    oracle = Oracle(mixture(VP), 4)
    for t in (torch.tensor(bad, dtype=D), torch.tensor([0.5, bad, 0.5, 0.5], dtype=D)[:, None]):
        with pytest.raises(ValueError, match=r"is outside \[0.001, 1.0\], where VP is regular"):
            oracle(X, t)
    assert oracle.nfe.sum() == 0


def test_times_at_the_ends_and_off_by_rounding_are_taken():
    oracle = Oracle(mixture(VP), 4)
    for t in (VP.t_min, VP.t_max, VP.t_max * (1 + 1e-15), VP.t_min * (1 - 1e-15)):
        assert oracle(X, torch.tensor(t, dtype=D)).x0.isfinite().all()
    each = torch.linspace(VP.t_min, VP.t_max, 4, dtype=D)[:, None]
    assert oracle(X, each).x0.shape == X.shape


def test_asking_for_noise_without_a_source_is_an_error():
    with pytest.raises(ValueError, match="no noise source"):
        _ = Oracle(mixture(VP), 4).noise
    source = seeded(range(4))
    assert Oracle(mixture(VP), 4, source).noise is source


# --- counting ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("named", [False, True])
def test_guidance_that_doubles_the_network_is_in_the_ledger(named):
    for denoiser, factor in ((mixture(VP), 1), (Twice(mixture(VP), named), 2), (Twice(Twice(mixture(VP)), named), 4)):
        found = s.sample(denoiser, (5, 2), s.Heun(), nfe=11, seeds=range(5))
        assert found.nfe == 11
        assert found.ledger["score"] == 10
        assert found.ledger["denoise"] == 1
        assert found.ledger["network"] == factor * 11
        assert found.ledger["guidance"] == (factor - 1) * 11  # one extra pass an evaluation: as many as nfe


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9])
def test_padding_is_not_counted(rows):
    """4 rows a call, the last call padded: every count is a sample's, as without microbatch."""
    for denoiser in (mixture(VP), Twice(mixture(VP))):
        whole = s.sample(denoiser, (rows, 2), s.Heun(), steps=5, seeds=range(rows), dtype=D)
        parts = s.sample(denoiser, (rows, 2), s.Heun(), steps=5, seeds=range(rows), dtype=D, microbatch=4)
        assert parts.nfe == whole.nfe == 11
        assert parts.nfe_each.tolist() == [11] * rows
        assert parts.ledger == pytest.approx(whole.ledger, rel=1e-12)
        assert parts.status.tolist() == [0] * rows


def test_the_network_sees_exactly_microbatch_rows():
    sizes = []
    denoiser = s.Wrapped.from_x0(lambda x, t: sizes.append(len(x)) or 0.5 * x, VP)
    s.sample(denoiser, (7, 2), s.Euler(), steps=2, seeds=range(7), microbatch=3)
    assert set(sizes) == {3}
    assert len(sizes) == 9  # 3 calls a piece, 3 pieces


def test_select_counts_its_rows_alone_and_into_the_same_ledger():
    denoiser = Rows(torch.arange(4.0, dtype=D)[:, None])
    oracle = Oracle(denoiser, 4, seeded(range(4)))
    oracle(X, T)
    part = oracle.select(torch.tensor([3, 1]))
    p = part(X[[3, 1]], T)
    assert torch.equal(p.x0, denoiser(X, T)[[3, 1]])
    assert oracle.nfe.tolist() == part.nfe.tolist() == [1, 2, 1, 2]
    assert oracle.ledger["score"] == 1 + 2 / 4
    deeper = part.select(torch.tensor([1]))  # row 1 of the root
    deeper(X[[1]], T)
    assert oracle.nfe.tolist() == [1, 3, 1, 2]
    assert deeper.names.tolist() == [1]
    drawn = part.noise.draw(X[[3, 1]], 2)
    assert torch.equal(drawn, seeded(range(4)).draw(X, 2)[[3, 1]])
    with pytest.raises(ValueError, match="outside"):
        part(X[[3, 1]], 3 * T)
    assert oracle.select(torch.tensor([0, 1])).noise_source is not None
    assert Oracle(denoiser, 4).select([0]).noise_source is None


def test_counting_books_under_a_kind_and_goes_back():
    oracle = Oracle(mixture(VP), 4)
    with oracle.counting("denoise"):
        oracle(X, T)
    with pytest.raises(KeyError), oracle.counting("denoise"):
        raise KeyError
    oracle(X, T)
    assert (oracle.ledger["denoise"], oracle.ledger["score"]) == (1, 1)
    assert oracle.nfe.tolist() == [2] * 4


def test_rejected_steps_are_told_to_the_ledger():
    """A kink that a large step runs into: the rejected evaluations are part of the score's."""
    denoiser = s.Wrapped.from_x0(lambda x, t: x * (0.9 if t > 0.45 else -0.9), VP)
    found = s.sample(denoiser, (3, 2), s.TorchDiffEq(rtol=1e-6, atol=1e-6), seeds=range(3), dtype=D)
    assert 0 < found.ledger["rejected"] < found.ledger["score"]
    assert found.ledger["score"] + 1 == found.nfe
    assert s.sample(denoiser, (3, 2), s.Heun(), nfe=9, seeds=range(3)).ledger["rejected"] == 0


def test_kinds_of_a_wrapper_are_recorded():
    class Jvp(Twice):
        def forward(self, x, t):
            self.record("divergence", 1.0)
            self.record("lookups", 3.0)
            return self.inner(x, t)

    found = s.sample(Jvp(mixture(VP)), (6, 2), s.Euler(), steps=4, seeds=range(6), microbatch=4)
    assert found.ledger["divergence"] == pytest.approx(5)
    assert found.ledger["lookups"] == pytest.approx(15)
    assert found.ledger["guidance"] == 0


def test_a_network_shared_by_two_denoisers_counts_for_each():
    net = s.MLP(2, width=8, depth=1)
    one, two = (s.Preconditioned(net, sde) for sde in (VP, s.EDM()))
    with Oracle(one, 4) as a, Oracle(two, 4) as b:
        a(X, T)
        b(X, T)
        b(X, T)
    assert (a.ledger["network"], b.ledger["network"]) == (1, 2)


# --- cleaning up ---------------------------------------------------------------------------------------------------------
def test_hooks_live_while_the_oracle_is_open():
    denoiser = Twice(mixture(VP))
    assert hooks(denoiser) == (0, 0)
    with Oracle(denoiser, 4) as oracle:
        assert hooks(denoiser) == (1, 2)
        with Oracle(denoiser, 4):
            assert hooks(denoiser) == (2, 4)
        assert hooks(denoiser) == (1, 2)
        oracle(X, T)
    assert hooks(denoiser) == (0, 0)
    denoiser(X, T)
    assert oracle.ledger["network"] == 2


@pytest.mark.parametrize("after", [0, 1, 5])
def test_hooks_are_removed_on_an_exception(after):
    inner = mixture(VP)
    for call in (
        lambda d: s.sample(d, (4, 2), s.Heun(), steps=5, seeds=range(4)),
        lambda d: s.log_prob(d, X, s.Heun(), steps=5),
        lambda d: s.encode(d, X, s.TorchDiffEq()),
    ):
        denoiser = Broken(inner, after)
        with pytest.raises(KeyboardInterrupt):
            call(denoiser)
        assert hooks(denoiser) == (0, 0)
        assert hooks(inner) == (0, 0)


def test_hooks_are_removed_when_the_solve_ends_in_nan():
    denoiser = s.Wrapped.from_x0(lambda x, t: x * float("nan"), VP)
    with pytest.raises(s.NonFiniteError):
        s.sample(denoiser, (4, 2), steps=3, seeds=range(4))
    assert hooks(denoiser) == (0, 0)


# --- status --------------------------------------------------------------------------------------------------------------
def test_status_is_the_first_bad_step_of_each_sample():
    oracle = Oracle(mixture(VP), 3)
    assert oracle.status().tolist() == [0, 0, 0]
    clean, inf = torch.zeros(3, 2), float("inf")
    later = clean.clone()
    later[1, 1] = inf
    last = later.clone()
    last[2] = torch.tensor([inf, -inf])
    for state in (clean, later, later, last):
        oracle.watch(state)
    assert oracle.status().tolist() == [0, 2, 4]
    times = torch.linspace(1, 0.2, 5, dtype=D)
    with pytest.raises(s.NonFiniteError, match=r"samples \[1, 2\] \(2 of 3\) .* after step 2 of 4 \(t = 0.8 -> 0.6\)"):
        oracle.check(times)
    names = Oracle(mixture(VP), 3, names=torch.tensor([5, 6, 6]))
    names.watch(last)
    with pytest.raises(s.NonFiniteError, match=r"samples \[6\] \(1 of 2\)"):
        names.check(times)


def test_samples_given_up_have_a_status_and_a_name():
    oracle = Oracle(mixture(VP), 4, names=torch.tensor([7, 8, 9, 9]), throw=False)
    oracle.lose(torch.tensor([1]), s.Status.MAX_NFE, "have used up")
    oracle.lose(torch.tensor([2, 3]), s.Status.DONE, "are not finite")
    assert oracle.status().tolist() == [0, s.Status.MAX_NFE, 1, 1]  # lost in the first step
    nan = torch.zeros(4, 2)
    nan[1:] = float("nan")
    oracle.watch(nan)
    assert oracle.status().tolist() == [0, -1, 1, 1]
    loud = Oracle(mixture(VP), 4, names=torch.tensor([7, 8, 9, 9]))
    with pytest.raises(s.UnfinishedError, match=r"^samples \[8, 9\] \(2 of 3\) are spent"):
        loud.lose(torch.tensor([1, 2, 3]), s.Status.MIN_STEP, "are spent")
    with pytest.raises(s.NonFiniteError, match=r"^samples \[9\] \(1 of 3\) are not finite"):
        loud.lose(torch.tensor([3]), s.Status.DONE, "are not finite")
    assert issubclass(s.UnfinishedError, RuntimeError)


def test_padding_repeats_the_last_row_and_is_not_counted():
    oracle = Oracle(mixture(VP), 4, kept=3, exact=True)
    assert oracle.pad(torch.tensor([2, 1])).tolist() == [2, 1, 1, 1]
    assert Oracle(mixture(VP), 4).pad(torch.tensor([2, 1])).tolist() == [2, 1]
    with oracle:
        part = oracle.select(oracle.pad(torch.tensor([2, 1])))
        part(X, T)
        assert oracle.nfe.tolist() == [0, 1, 1, 0]
        assert oracle.ledger["score"] == oracle.ledger["network"] == pytest.approx(2 / 3)
        oracle.reject(torch.tensor([1, 3]), 6)  # 3 is padding
        assert oracle.ledger["rejected"] == pytest.approx(2)
        part.record("divergence", 2.0)  # by those it was asked for
        assert oracle.ledger["divergence"] == pytest.approx(4 / 3)


def test_a_finite_solve_passes_the_check():
    oracle = Oracle(mixture(VP), 3)
    oracle.watch(torch.ones(3, 2))
    assert not oracle.check(torch.tensor([1.0, 0.5])).any()


def test_rows_follow_their_denoiser_through_microbatches():
    """`select` of a denoiser that holds per-sample tensors: any microbatch, the same result, padding included."""
    shift = torch.linspace(-1, 1, 7, dtype=D)[:, None]
    x = seeded(range(7)).initial((7, 2), D)
    times = torch.tensor([1.0, 0.5, 0.1], dtype=D)
    whole = solve(Rows(shift), x, s.Heun(), times, None, None).x
    for size in (1, 2, 3, 10):
        assert (solve(Rows(shift), x, s.Heun(), times, None, size).x - whole).abs().max() < 1e-14


def test_modules_inside_a_network_are_not_counted_as_leaves():
    """The leaf is the denoiser that owns the net, however many layers it has."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    denoiser = s.Wrapped.from_eps(lambda x, t: net(x), VP)
    denoiser.net = net
    assert s.sample(denoiser, (3, 2), s.Euler(), steps=4, seeds=range(3), dtype=D).ledger["network"] == 5
