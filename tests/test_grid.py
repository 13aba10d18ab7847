"""Grids: properties that hold for every rule, SDE and number of steps."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import D, every_sde

from scoresde import EDM, VE, VP, LinearSDE, grid
from scoresde.grid import check_times

SDES = every_sde()
RULES = {name: getattr(grid, name) for name in grid.__all__ if name != "interval"}
always = settings(derandomize=True, deadline=None, max_examples=60, database=None)

sdes = st.sampled_from(sorted(SDES))
steps = st.integers(1, 300)
rhos = st.floats(0.5, 50.0, allow_nan=False)


def check(times, sde, n):
    assert times.dtype == D
    assert times.shape == (n + 1,)
    assert float(times[0]) == sde.t_max
    assert float(times[-1]) == sde.t_min
    assert bool((times.diff() < 0).all())
    assert bool(((times >= sde.t_min) & (times <= sde.t_max)).all())
    assert torch.equal(check_times(times, sde), times)
    if n <= 100:
        assert bool((times.float().diff() < 0).all())


@pytest.mark.parametrize("rule", RULES)
@always
@given(name=sdes, n=steps)
def test_ends_are_exact_and_times_fall(rule, name, n):
    check(RULES[rule](SDES[name], n), SDES[name], n)


@always
@given(name=sdes, n=steps, rho=rhos)
def test_karras_for_any_rho(name, n, rho):
    check(grid.karras(SDES[name], n, rho=rho), SDES[name], n)


@always
@given(
    low=st.floats(1e-5, 0.3),
    width=st.floats(0.01, 3.0),
    n=steps,
    rule=st.sampled_from(sorted(RULES)),
    kind=st.sampled_from([VP, VE, EDM]),
)
def test_any_span_of_times(low, width, n, rule, kind):
    sde = kind(t_min=low, t_max=low + width)
    check(RULES[rule](sde, n), sde, n)


@pytest.mark.parametrize("name", sorted(SDES))
def test_each_rule_is_uniform_in_its_own_variable(name):
    sde, n = SDES[name], 37
    rho = 3.0
    variables = {
        grid.uniform: lambda t: t,
        grid.quadratic: lambda t: t.sqrt(),
        grid.logsnr: sde.logsnr,
        functools.partial(grid.karras, rho=rho): lambda t: sde.rho(t) ** (1 / rho),
        grid.karras: lambda t: sde.rho(t) ** (1 / 7),
    }
    for rule, variable in variables.items():
        gaps = variable(rule(sde, n)).diff()
        assert (gaps / gaps.mean() - 1).abs().max() < 1e-9


def test_karras_is_the_published_sequence():
    """Karras et al. 2022, eq. 5, at their settings."""
    i, n = torch.arange(18, dtype=D), 18
    published = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(grid.karras(EDM(), 17), published, rtol=1e-12)


def test_interval_is_the_two_ends():
    for sde in SDES.values():
        assert grid.interval(sde).tolist() == [sde.t_max, sde.t_min]
        assert grid.interval(sde, 1).tolist() == [sde.t_max, sde.t_min]


def test_grids_of_a_users_sde():
    """An SDE by its two coefficients alone: `time` is by bisection."""
    sde = LinearSDE.from_coefficients(lambda t: -t, lambda t: 1 + t, t_min=1e-4, t_max=3.0)
    for rule in RULES.values():
        for n in (1, 2, 33, 300):
            check(rule(sde, n), sde, n)


# --- check_times ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(SDES))
def test_times_outside_by_rounding_become_the_end_they_meant(name):
    sde = SDES[name]
    times = torch.tensor([sde.t_max * (1 + 1e-15), sde.t_min * (1 - 1e-15)], dtype=D)
    assert check_times(times, sde).tolist() == [sde.t_max, sde.t_min]
    for factor in (1 + 1e-9, 1 + 1e-6):
        with pytest.raises(ValueError, match="outside"):
            check_times(torch.tensor([sde.t_max * factor, sde.t_min], dtype=D), sde)


def test_times_may_run_up_or_down_and_come_in_any_float():
    sde = VP()
    for dtype in (torch.float32, D, torch.float16):
        times = torch.tensor([1.0, 0.5, 0.25], dtype=dtype)
        for given_times in (times, times.flip(0)):
            found = check_times(given_times, sde)
            assert found.dtype == D
            assert torch.equal(found, given_times.double())
    assert not check_times(torch.tensor([1.0, 0.5], requires_grad=True), sde).requires_grad


def is_a_grid(values, sde):
    pairs = [b - a for a, b in pairwise(values)]
    return (
        len(values) > 1
        and all(map(math.isfinite, values))
        and all(sde.t_min <= v <= sde.t_max for v in values)
        and (all(p < 0 for p in pairs) or all(p > 0 for p in pairs))
    )


anything = st.lists(st.one_of(st.floats(1e-3, 1.0), st.floats(width=64)), max_size=4)
inside = st.lists(st.floats(1e-3, 1.0), max_size=4)
sorted_inside = st.lists(st.floats(1e-3, 1.0), max_size=6, unique=True).map(sorted)


@settings(always, max_examples=300)
@given(values=st.one_of(anything, inside, sorted_inside, sorted_inside.map(lambda v: v[::-1])))
def test_what_passes_is_monotone_inside_and_finite_and_nothing_else_does(values):
    sde, times = VP(), torch.tensor(values, dtype=D)
    try:
        found = check_times(times, sde).tolist()
    except ValueError:
        found = None
    assert found == (values if is_a_grid(values, sde) else None)
