"""fit and EMA: that training reaches the truth, and what happens when it does not."""

import copy
import inspect
import math
from itertools import islice, repeat

import pytest
import torch
from laws import D, mixture
from torch import nn

import scoresde as s
from scoresde import EMA, VP, NonFiniteError, loss, parameterizations
from scoresde.noise import seeded

X = seeded(range(16)).initial((16, 2), torch.float32)


def model(classes=0, seed=0, **kwargs):
    return s.Preconditioned(s.MLP(2, width=16, depth=1, classes=classes, seed=seed), VP(), **kwargs)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- does it learn -------------------------------------------------------------------------------------------------------
def test_training_reaches_the_exact_likelihood(record_property):
    """An MLP, 300 steps on the 2-D mixture: its NLL on held-out draws of exact p_{t_min} is within 0.2 nats of the truth."""
    law, steps, batch = mixture(VP()), 300, 256
    data = law.sample(steps * batch, seeds=range(steps * batch)).float()
    net = s.Preconditioned(s.MLP(2, width=64, depth=2, emb=32), law.sde)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    ema, losses = EMA(net, 0.99), []
    for step in s.fit(net, data.split(batch), optimizer=optimizer, ema=ema, generator=generator()):
        schedule.step()
        losses.append(step.loss)
    first = torch.tensor(law.sde.t_min, dtype=D)
    held_out = law.sample(500, first, seeds=range(10**9, 10**9 + 500))
    found = s.log_prob(ema.module, held_out.float(), s.TorchDiffEq(rtol=1e-4, atol=1e-4)).value.double()
    gap = float((law.log_prob(held_out, first) - found).mean())
    record_property("gap", gap)
    print(f"NLL of the network minus the exact one: {gap:.3f} nats; last loss {losses[-1]:.3f}")
    assert abs(gap) < 0.2
    assert sum(losses[-50:]) < sum(losses[:50])


@pytest.mark.parametrize("weight", [loss.simple, loss.capped, loss.edm, loss.likelihood], ids=lambda w: w.__name__)
@pytest.mark.parametrize("fn", [parameterizations.eps, parameterizations.v, parameterizations.x0, parameterizations.velocity])
def test_every_weight_trains_every_parameterization(weight, fn):
    """Fixed data, times and noise (a generator set back): 30 steps of Adam lower the loss."""
    net = model(parameterization=fn)
    source, losses = generator(), []
    state = source.get_state()
    for step in s.fit(net, repeat(X, 30), weight=weight, optimizer=torch.optim.Adam(net.parameters(), lr=3e-3), generator=source):
        losses.append(step.loss)
        source.set_state(state)
    assert losses[-1] < losses[0]


def test_labels_are_learnt():
    """Two classes, two points: the conditional network tells them apart."""
    net = model(classes=2)
    points = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    batches = [(points[c], c) for c in (torch.arange(64) % 2).expand(150, 64)]
    steps = list(s.fit(net, batches, optimizer=torch.optim.Adam(net.parameters(), lr=1e-2), generator=generator()))
    assert len(steps) == 150
    t = torch.tensor(0.6, dtype=D)
    guess = net.condition(torch.tensor([0, 1]))(torch.zeros(2, 2), t)
    assert guess[0, 0] > 0.5
    assert guess[1, 0] < -0.5


# --- the generator -------------------------------------------------------------------------------------------------------
def test_fit_is_a_generator_that_the_caller_stops():
    net = model()
    before = weights(net)
    steps = s.fit(net, repeat(X), generator=generator())
    assert inspect.isgenerator(steps)
    assert equal(weights(net), before)
    seen = list(islice(steps, 3))
    assert [step.step for step in seen] == [1, 2, 3]
    assert all(isinstance(step, s.Step) and step.loss > 0 and step.grad_norm > 0 for step in seen)
    assert not equal(weights(net), before)
    assert net.training
    assert list(s.fit(net, [])) == []


def test_training_is_a_function_of_its_generator():
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("fresh", None), ("fresh again", None)):
        net = model()
        ema = EMA(net)
        steps = list(s.fit(net, repeat(X, 5), ema=ema, generator=None if seed is None else generator(seed)))
        runs[name] = ([step.loss for step in steps], weights(net), weights(ema.module))
    assert runs["a"][0] == runs["b"][0]
    assert equal(runs["a"][1], runs["b"][1])
    assert equal(runs["a"][2], runs["b"][2])
    assert runs["a"][0] != runs["c"][0]
    assert runs["fresh"][0] != runs["fresh again"][0]


def test_a_step_is_the_loss_its_gradient_and_the_optimizer():
    """One step written out: times and noise from the generator, dsm_loss, clipped gradient, SGD."""
    net, source = model(), generator()
    by_hand = copy.deepcopy(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    (step,) = s.fit(net, [X], weight=loss.simple, times=loss.uniform, optimizer=sgd, clip=0.05, generator=source)
    source = generator()
    u = torch.rand(16, generator=source, dtype=D)
    noise = torch.randn(16, 2, generator=source)
    value = s.dsm_loss(by_hand, X, loss.uniform(VP(), u), loss.simple, noise).mean()
    gradients = torch.autograd.grad(value, list(by_hand.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert step.loss == pytest.approx(float(value.detach()))
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.05
    for p, q, g in zip(net.parameters(), by_hand.parameters(), gradients, strict=True):
        assert torch.allclose(p, q - 0.1 * g * (0.05 / norm), atol=1e-7)


def test_clip_may_be_infinite():
    net, other = model(), model()
    for each, clip in ((net, math.inf), (other, 1e9)):
        list(s.fit(each, [X], optimizer=torch.optim.SGD(each.parameters(), lr=0.1), clip=clip, generator=generator()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights(net), weights(other), strict=True))


def test_conditional_batches_reach_the_network():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x, c_noise, cond=None):
            seen.append(cond)
            return self.w * x

    net = s.Preconditioned(Net(), VP())
    labels = torch.arange(16)
    list(s.fit(net, [X, (X, labels), [X, labels], (X, None)], generator=generator()))
    assert seen[0] is None
    assert torch.equal(seen[1], labels)
    assert torch.equal(seen[2], labels)
    assert seen[3] is None
    assert net.cond is None


def test_only_the_optimizers_parameters_move():
    net = model()
    before = weights(net.net.enter)
    list(s.fit(net, [X, X], optimizer=torch.optim.SGD(net.net.leave.parameters(), lr=0.1), generator=generator()))
    assert equal(weights(net.net.enter), before)
    assert net.net.leave.weight.abs().sum() > 0


# --- failures ------------------------------------------------------------------------------------------------------------
class Cliff(nn.Module):
    """A network that returns NaN from call `after` on."""

    def __init__(self, after):
        super().__init__()
        self.w, self.after = nn.Parameter(torch.ones(2)), after

    def forward(self, x, c_noise):
        self.after -= 1
        return self.w * x * (math.nan if self.after < 0 else 1.0)


@pytest.mark.parametrize("after", [0, 2])
def test_nan_raises_before_the_parameters_change(after):
    net = s.Preconditioned(Cliff(after), VP())
    ema, adam = EMA(net), torch.optim.Adam(net.parameters())
    steps = s.fit(net, repeat(X), optimizer=adam, ema=ema, generator=generator())
    done = list(islice(steps, after))
    kept, averaged, moments = weights(net), weights(ema.module), copy.deepcopy(adam.state_dict())
    with pytest.raises(NonFiniteError, match=rf"step {after + 1}: loss nan.*parameters are as they were.*learning rate"):
        next(steps)
    assert len(done) == after
    assert equal(weights(net), kept)
    assert equal(weights(ema.module), averaged)
    assert str(adam.state_dict()) == str(moments)


def test_an_infinite_gradient_raises_too():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x, c_noise):
            return self.w.abs().sqrt() * x  # finite, with an infinite derivative at 0

    net = s.Preconditioned(Root(), VP())
    with pytest.raises(NonFiniteError, match=r"step 1: loss [0-9.]+, gradient norm (inf|nan)"):
        list(s.fit(net, [X], generator=generator()))
    assert net.net.w.tolist() == [0.0, 0.0]


# --- EMA -----------------------------------------------------------------------------------------------------------------
class Buffered(nn.Module):
    """A float buffer, which is averaged, and a counter, which is copied."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x, c_noise):
        if self.training:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
            self.count += 1
        return self.w * x + self.mean


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
def test_ema_is_the_recursion_written_out(decay):
    """First a copy, then a <- d a + (1 - d) x with d = min(decay, (1 + n) / (10 + n)) at update n; buffers likewise."""
    net = s.Preconditioned(Buffered(), VP())
    ema = EMA(net, decay)
    w, mean = net.net.w.detach().clone(), net.net.mean.clone()
    for n, step in enumerate(s.fit(net, repeat(X, 12), ema=ema, generator=generator())):
        now = net.net.w.detach(), net.net.mean
        if n == 0:
            w, mean = (v.clone() for v in now)
        else:
            d = min(decay, (1 + n) / (10 + n))
            w, mean = d * w + (1 - d) * now[0], d * mean + (1 - d) * now[1]
        assert step.step == n + 1
        assert torch.allclose(ema.module.net.w, w, rtol=1e-5)
        assert torch.allclose(ema.module.net.mean, mean, rtol=1e-5, atol=1e-7)
        assert int(ema.module.net.count) == n + 1
    assert not torch.equal(ema.module.net.w, net.net.w) or decay == 0.0


def test_the_average_is_a_frozen_copy():
    net = model()
    ema = EMA(net)
    assert ema.module is not net
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in net.parameters())
    kept = weights(ema.module)
    list(s.fit(net, [X, X], generator=generator()))
    assert equal(weights(ema.module), kept)  # not told
    ema.update(net)
    assert equal(weights(ema.module), weights(net))  # the first update is a copy
    x = s.sample(ema.module, (3, 2), nfe=9, seeds=range(3)).x
    assert x.isfinite().all()
    assert isinstance(ema.module, s.Preconditioned)


def test_batch_norm_counters_do_not_stop_the_average():
    net = s.Preconditioned(nn.Sequential(), VP())
    net.net = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
    net.net.forward = lambda x, c_noise: net.net["norm"](x)
    ema = EMA(net)
    for _ in range(3):
        net(X, torch.tensor(0.5, dtype=D))
        ema.update(net)
    assert int(ema.module.net["norm"].num_batches_tracked) == 3
