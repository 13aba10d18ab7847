"""Write the tables of docs/objectives.md: `python docs/objectives.py` (two minutes on one core). Data and SDEs of tests/laws.py."""

import math
import sys
from functools import cache, partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
import laws  # noqa: E402
import markers  # noqa: E402
import torch  # noqa: E402

import scoresde  # noqa: E402
from scoresde import loss, objectives, parameterizations  # noqa: E402

EVERY = laws.every_sde()
SDES = ("VP", "VE", "EDM", "Cosine")
WEIGHTS = {
    "simple": loss.simple, "truncated_snr": loss.truncated_snr, "snr_plus_one": loss.snr_plus_one, "min_snr(5)": loss.min_snr(5.0),
    "edm": partial(loss.edm, sigma_data=1.0), "likelihood": loss.likelihood,
}  # fmt: skip
OBJECTIVES = {
    "controlled()": objectives.controlled(), "antithetic()": objectives.antithetic(),
    "implicit": objectives.implicit_score_matching, "sliced": objectives.sliced_score_matching,
}  # fmt: skip
LEVELS = (0.001, 0.003, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)


@cache
def trained(sde: scoresde.LinearSDE, steps: int = 300) -> tuple[scoresde.Preconditioned, torch.Tensor]:
    """A small network somewhat trained, and data: a step that is neither at the start nor at the minimum."""
    law = laws.mixture(sde)
    data = law.sample(4096, seeds=range(4096)).float()
    denoiser = scoresde.Preconditioned(scoresde.MLP(2, width=32, depth=1), sde, partial(parameterizations.edm, sigma_data=1.0))
    generator = torch.Generator().manual_seed(0)
    batches = (data[torch.randint(len(data), (256,), generator=generator)] for _ in range(steps))
    for _ in scoresde.fit(denoiser, batches, weight=WEIGHTS["edm"], generator=generator):
        pass
    return denoiser, data


def measure(denoiser, data, **settings) -> objectives.GradientVariance:
    """Of batches of 256, 200 draws."""
    generator = torch.Generator().manual_seed(1)
    return objectives.gradient_variance(denoiser, data, batch=256, draws=200, generator=generator, **settings)


def gain(plain: objectives.GradientVariance, other: objectives.GradientVariance) -> str:
    """Ratio of variances, with its standard error."""
    ratio = plain.variance / other.variance
    return f"{ratio:.3g} ± {ratio * math.hypot(plain.stderr / plain.variance, other.stderr / other.variance):.1g}"


def relative(found: objectives.GradientVariance) -> str:
    """Variance over squared mean, where the draws resolve the mean."""
    return f"{found.relative:.2g}" if found.mean_square * found.draws > found.variance else f"> {found.draws}"


def times() -> str:
    """How many times less the variance of a step is than with uniform times, for one weighted integral."""
    heads = ("weight", "SDE", "stratified", "low_discrepancy", "importance(V=1)", "importance(V=inf)", "stratified importance(V=1)")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in SDES:
        of = partial(measure, *trained(EVERY[name]))
        for label in ("likelihood", "simple", "edm"):
            weight = WEIGHTS[label]
            imp, flat = loss.importance(weight), loss.importance(weight, math.inf)
            plain = of(weight=weight, times=loss.uniform)
            cells = [gain(plain, of(weight=weight, times=draw(loss.uniform))) for draw in (loss.stratified, loss.low_discrepancy)]
            cells += [gain(plain, of(weight=one.weight, times=one)) for one in (imp, flat)]
            cells.append(gain(plain, of(weight=imp.weight, times=loss.stratified(imp))))
            lines.append(f"| `{label}` | {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def weights() -> str:
    """Variance over squared mean of a step of each weight, at uniform times and at those of its importance."""
    lines = ["| weight | " + " | ".join(f"{n}, uniform | {n}, importance" for n in SDES) + " |", "|---" * (1 + 2 * len(SDES)) + "|"]
    for label, weight in WEIGHTS.items():
        imp = loss.importance(weight)
        of = [partial(measure, *trained(EVERY[name])) for name in SDES]
        cells = [relative(at(weight=w, times=draw)) for at in of for w, draw in ((weight, loss.uniform), (imp.weight, imp))]
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def levels() -> str:
    """How many times less the variance of a step is than that of `dsm_loss`, at one noise level."""
    sde = scoresde.EDM(t_min=5e-4)
    of = partial(measure, *trained(sde), weight=WEIGHTS["edm"])
    lines = [
        "| sigma / alpha | dsm_loss: variance / mean² | " + " | ".join(OBJECTIVES) + " |",
        "|---" * (2 + len(OBJECTIVES)) + "|",
    ]
    for rho in LEVELS:
        at = lambda _, u, rho=rho: torch.full_like(u, rho)
        plain = of(objective=scoresde.dsm_loss, times=at)
        cells = [gain(plain, of(objective=objective, times=at)) for objective in OBJECTIVES.values()]
        lines.append(f"| {rho:g} | {relative(plain)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, made in (("levels", levels()), ("times", times()), ("weights", weights())):
        markers.fill(HERE / "objectives.md", name, made)
