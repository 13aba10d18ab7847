"""The divergence: every estimator against the trace, in both modes, without bias, seed by seed."""

import math

import numpy as np
import pytest
import torch
from laws import D, mixture, unet
from torch import nn

import scoresde as s
from scoresde import VP, Gaussian, Heun
from scoresde.divergence import Jacobian, Mode, coloured, colours, default, exact, gaussian, hutchpp, rademacher
from scoresde.noise import seeded

CPU = torch.device("cpu")
T = torch.tensor(0.4, dtype=D)


def mlp(d, shape=None):
    net = s.MLP(shape or d, width=16, depth=2).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.2 * seeded([i]).initial((1, *p.shape), D)[0])
    return s.Preconditioned(net, VP())


def traces(model, x, divergence, mode, seeds=None, costs=None):
    """(estimates [chains, B], x0)."""
    record = lambda name, amount: costs is not None and costs.append((name, amount))
    jacobian = Jacobian(lambda v: model.predict(v, T).x0, x, Mode(mode, CPU), record)
    found = divergence.trace(jacobian, x, divergence.probes(seeded(range(len(x)) if seeds is None else seeds), x))
    return found, jacobian.x0


def true_traces(model, x):
    """By the whole Jacobian of each sample."""
    rows = [torch.autograd.functional.jacobian(lambda v: model.predict(v, T).x0, row[None]).reshape(row.numel(), -1) for row in x]
    return torch.stack([row.diagonal().sum() for row in rows])


MODELS = {
    "vectors": (mlp(3), seeded(range(3)).initial((3, 3), D)),
    "images": (unet(attention=(1,)), seeded(range(3)).initial((3, 1, 4, 4), D)),
    "a law": (mixture(VP()), seeded(range(3)).initial((3, 2), D)),
    "one number": (mlp(1), seeded(range(3)).initial((3, 1), D)),
}


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_trace_of_the_jacobian(name, chunk, mode):
    model, x = MODELS[name]
    with torch.no_grad():
        found, x0 = traces(model, x, exact(chunk), mode)
        assert torch.allclose(x0, model.predict(x, T).x0, rtol=1e-12)
    assert found.shape == (1, 3)
    assert torch.allclose(found[0], true_traces(model, x), rtol=1e-11)
    assert not found.requires_grad


LINEAR = [rademacher(1), rademacher(3), gaussian(2), coloured(2, 2), coloured(3, 1), exact(5)]


@pytest.mark.parametrize("divergence", LINEAR, ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_reverse_mode_are_equal(name, divergence):
    """p' (J p) = (J' p)' p."""
    model, x = MODELS[name]
    with torch.no_grad():
        (a, x0), (b, y0) = (traces(model, x, divergence, mode) for mode in ("forward", "reverse"))
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert torch.allclose(x0, y0, rtol=1e-12)


def test_gradients_are_never_taken_through_forward_mode():
    """torch's layer_norm gives a wrong gradient of its forward derivative."""
    model, x = MODELS["vectors"]
    weight = model.net.leave.weight
    assert s.log_prob(model, x, nfe=4, differentiable=True).mode == "reverse"
    assert Mode(None, torch.device("meta")).name == "reverse"
    with torch.no_grad():
        assert Mode(None, torch.device("meta")).name == "forward"
    with pytest.raises(ValueError, match="no gradients that can be relied on"):
        s.log_prob(model, x, nfe=4, differentiable=True, divergence=exact(mode="forward"))
    found, _ = traces(model, x, exact(), "reverse")
    gradient = torch.autograd.grad(found.sum(), weight)[0][0, 0]
    ends = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            weight[0, 0] += h
            ends.append(float(traces(model, x, exact(), "reverse")[0].sum()))
            weight[0, 0] -= h
    assert float(gradient) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


SHEARED = Gaussian(  # its Jacobian has off-diagonal entries, whose sum is what a probe's error is made of
    VP(), torch.zeros(3, dtype=D), covariance=torch.tensor([[1.0, 0.6, 0.2], [0.6, 0.5, -0.1], [0.2, -0.1, 0.7]], dtype=D)
)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize(
    "divergence",
    [rademacher(1), rademacher(2), gaussian(1), gaussian(3), coloured(2, 1), coloured(2, 3), hutchpp(3, 1), hutchpp(6, 2)],
    ids=repr,
)
def test_estimators_are_unbiased_over_4096_probes_in_3_dimensions(divergence, mode):
    """z < 5 for the mean, and the spread of the mean over chains falls as 1 / sqrt(chains)."""
    for model in (SHEARED, mlp(3)):
        x = torch.tensor([[0.5, -0.4, 0.9]], dtype=D)
        with torch.no_grad():
            truth = float(traces(model, x, exact(), "reverse")[0])
            found, _ = traces(model, x.expand(4096, 3), divergence, mode)
        means = found.mean(0)
        spread = float(means.std())
        assert abs(float(means.mean()) - truth) <= 5 * spread / 64 + 1e-12
        if divergence.chains > 1 and spread > 1e-9:
            single = float(found.std(1).square().mean().sqrt())
            assert spread == pytest.approx(single / divergence.chains**0.5, rel=0.15)


def test_signs_never_vary_more_than_normals_and_colours_less_on_a_local_jacobian():
    """An image law whose covariance falls off with the distance, 6 x 6: the Jacobian of its denoiser is local too."""
    place = np.stack(np.meshgrid(np.arange(6), np.arange(6), indexing="ij"), -1).reshape(-1, 2)
    distance = np.linalg.norm(place[:, None] - place[None], axis=2)
    law = Gaussian(VP(), torch.zeros(1, 6, 6, dtype=D), covariance=torch.from_numpy(np.exp(-distance / 1.5))[None][0])
    x = torch.zeros(2000, 1, 6, 6, dtype=D)
    with torch.no_grad():
        spread = lambda divergence: float(traces(law, x, divergence, "reverse")[0].mean(0).std())
        signs, normals = spread(rademacher(4)), spread(gaussian(4))
        coloured4, checkerboard = spread(coloured(4, 1)), spread(coloured(2, 2))
    assert signs <= 1.05 * normals
    assert coloured4 < 0.7 * signs
    assert checkerboard < 0.9 * signs


def test_a_diagonal_jacobian_has_no_error_with_signs():
    law = Gaussian(VP(), torch.zeros(3, dtype=D), torch.tensor([0.2, 0.5, 1.0], dtype=D))
    x = torch.zeros(50, 3, dtype=D)
    with torch.no_grad():
        for divergence in (rademacher(1), coloured(2, 1)):
            found, _ = traces(law, x, divergence, "reverse")
            assert float((found - true_traces(law, x[:1])).abs().max()) < 1e-12


# --- colours -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 6), (5,), (7, 4), (1, 1, 9), (2, 3, 4, 4)])
@pytest.mark.parametrize("k", [1, 2, 4, 5, 16])
def test_colours_share_out_the_event(shape, k):
    found = colours(shape, k)
    assert found.shape == shape
    assert set(np.unique(found)) <= set(range(k))
    sizes = np.bincount(found.flatten(), minlength=k)
    assert sizes.sum() == math.prod(shape)


def test_equal_colours_are_far_apart():
    """k = 2 is a checkerboard; k = 4 keeps them 2 apart, 16 keeps them 4; channels of one pixel differ."""
    assert (np.diff(colours((1, 8, 8), 2)[0], axis=0) != 0).all()
    assert (np.diff(colours((1, 8, 8), 2)[0], axis=1) != 0).all()
    for k, least in ((4, 2.0), (16, 4.0)):
        found = colours((1, 12, 12), k)[0]
        place = np.argwhere(found == found[5, 5])
        distance = np.linalg.norm(place - [5, 5], axis=1)
        assert distance[distance > 0].min() >= least
    rgb = colours((3, 6, 6), 6)
    assert all(len(set(rgb[:, i, j])) == 3 for i in range(6) for j in range(6))


# --- modes ---------------------------------------------------------------------------------------------------------------
class Strange(nn.Module):
    """Its only operation has a derivative in one of the modes, or in both but for one vector at a time."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, c_noise):
        return self.kind.apply(x)


class Quiet(nn.Module):
    """Without a derivative in any mode."""

    @torch.inference_mode()
    def forward(self, x, c_noise):
        return x.sin()


class OnlyReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_what_has_no_forward_derivative_goes_back():
    """Left to choose, forward mode gives way; asked for, it is an error; reverse mode is reported."""
    model = s.Preconditioned(Strange(OnlyReverse), VP())
    x = seeded(range(2)).initial((2, 3), D)
    with torch.no_grad():
        mode = Mode(None, torch.device("meta"))
        assert mode.name == "forward"
        jacobian = Jacobian(lambda v: model.predict(v, T).x0, x, mode, lambda *_: None)
        found = exact().trace(jacobian, x, x[:0])
    assert mode.name == "reverse"
    assert torch.allclose(found[0], true_traces(model, x), rtol=1e-12)
    with pytest.raises(RuntimeError):
        s.log_prob(model, x, nfe=4, divergence=exact(mode="forward"))
    assert s.log_prob(model, x, nfe=4).mode == "reverse"


def test_no_grad_inside_a_network_is_fine_in_forward_mode():
    """It has derivatives forward all the same; under inference_mode it has none, and says so."""
    law = mixture(VP())
    x = seeded(range(4)).initial((4, 2), D)
    quiet = s.Wrapped.from_x0(torch.no_grad()(lambda x, t: law(x, t)), VP())
    a, b = (s.log_prob(m, x, nfe=8, divergence=exact(mode="forward")) for m in (law, quiet))
    assert torch.equal(a.value, b.value)
    assert a.mode == b.mode == "forward"
    silent = s.Preconditioned(Quiet(), VP())
    for k in (1, 2):
        with pytest.raises(ValueError, match="its divergence is unknown"):
            s.log_prob(silent, x, nfe=4, divergence=rademacher(k, mode="forward"))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_costs_are_counted(mode):
    """A product is 1 forward and 2 back; every chunk after the first repeats the network in forward mode."""
    model, x = MODELS["images"]
    for divergence, products, passes in (
        (exact(), 16, 1),
        (exact(4), 16, 4),
        (rademacher(3), 3, 1),
        (coloured(4, 2), 8, 1),
        (hutchpp(6, 2), 12, 2),
    ):
        found = s.log_prob(
            model, x, Heun(), steps=2, divergence=divergence.__class__(**{**divergence.__dict__, "mode": mode}), seeds=range(3)
        )
        cost = 1 if mode == "forward" else 2
        repeated = (passes - 1) * found.nfe if mode == "forward" else 0
        assert found.ledger["divergence"] == cost * products * found.nfe
        assert found.ledger.get("repeated", 0) == repeated
        assert found.ledger["network"] == found.nfe + repeated
        assert found.ledger["guidance"] == 0
        assert found.mode == mode


def test_the_default_is_exact_up_to_256_numbers():
    assert default((2,)) == exact()
    assert default((1, 16, 16)) == exact()
    assert default((3, 16, 16)).random
    assert default((3, 16, 16)).chains >= 2


# --- in a solve ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("divergence", [rademacher(2), gaussian(2), coloured(2, 2), hutchpp(3, 2)], ids=repr)
def test_probes_are_fresh_on_a_grid_frozen_on_request_and_a_seeds_own(divergence):
    model, x = MODELS["vectors"]
    frozen = divergence.__class__(**{**divergence.__dict__, "frozen": True})
    value = lambda d, seeds=range(3), rows=x, **kw: s.log_prob(model, rows, Heun(), steps=6, divergence=d, seeds=seeds, **kw)
    a, b = value(divergence), value(frozen)
    assert not torch.equal(a.value, b.value)
    assert torch.equal(a.latent, b.latent)
    assert torch.allclose(value(divergence, [2], x[2:]).value, a.value[2:], rtol=1e-10)
    assert torch.equal(value(divergence, microbatch=2).value[:2], value(divergence, range(2), x[:2], microbatch=2).value)
    assert (a.stderr > 0).all()
    once = value(
        divergence.__class__(**{**divergence.__dict__, **({"chains": 1} if "chains" in divergence.__dict__ else {"k": 1})})
    )
    assert once.stderr.isnan().all()


def test_fresh_probes_have_less_spread_than_frozen_ones():
    """The errors of fresh ones average out over the nodes of the grid, those of frozen ones do not."""
    n = 400
    x = torch.tensor([[0.7, -0.3, 0.2]], dtype=D).expand(n, 3)
    spread = [
        float(s.log_prob(SHEARED, x, steps=24, divergence=rademacher(1, frozen=f), seeds=range(n)).value.std())
        for f in (False, True)
    ]
    assert spread[0] < 0.6 * spread[1]
