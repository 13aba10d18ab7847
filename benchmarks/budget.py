"""The error budget of a real likelihood: every term of it for the U-Net of `fashion.py` on test images of Fashion-MNIST.

python benchmarks/budget.py      print the table and put it into docs/likelihood.md (five minutes on one core); the images as in fashion.py
"""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import fashion
import torch
from noise import processor

import scoresde
from scoresde import VP, TruncatedNormal, bits_per_dim, checkpoint, compare, elbo, log_prob

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from markers import fill

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks/results/budget.json"
N, SAMPLES, D = 16, 2, 784
NAT = 1 / (D * math.log(2))  # of a nat, in bits a number


def measured() -> list[dict[str, str]]:
    """A row a term."""
    images, seeds = fashion.images("t10k")[:N].long(), range(N)
    model = checkpoint.load(fashion.FOLDER)
    net = lambda t_min: scoresde.Preconditioned(model.net, VP(t_min=t_min), model.parameterization)
    told = {"levels": 256, "seeds": seeds, "microbatch": 16}
    base = bits_per_dim(model, images, samples=SAMPLES, **told)
    alpha = float(model.sde.alpha(torch.tensor(model.sde.t_min, dtype=torch.float64)))
    u = scoresde.noise.seeded(seeds).uniform(torch.zeros(images.shape), 4)
    x = alpha * scoresde.Quantized(256).to_model(images, u)
    one = log_prob(model, x, seeds=seeds, microbatch=16, solver_error=True)
    fine = log_prob(model, x, steps=192, seeds=seeds, microbatch=16, divergence=scoresde.divergence.rademacher(2, frozen=True))
    rough = log_prob(model, x, steps=64, seeds=seeds, microbatch=16, divergence=scoresde.divergence.rademacher(2, frozen=True))
    rows = [("bits/dim: uniform dequantization, default solver and divergence", base.value, f"± {base.stderr:.3f} over {N} images")]
    probe = float((one.stderr.square().mean()).sqrt()) * NAT
    rows += [
        ("noise of probes, one image", probe, f"{one.divergence}, {one.nfe} evaluations; of the mean {probe / N**0.5:.5f}"),
        (f"noise of u and probes, the mean of {N} images x {SAMPLES} draws", base.stderr_noise, "`stderr_noise`"),
        ("solver error, stated", float(one.solver_error.mean()) * NAT, "`solver_error`, mean over images"),
        (
            "solver error, measured",
            float((rough.value - fine.value).abs().mean()) * NAT,
            "against 192 steps, the same frozen probes",
        ),
        ("prior mismatch, at most", one.prior_mismatch * NAT, "`prior_mismatch`"),
    ]
    for t_min in (1e-2, 1e-4):
        found = bits_per_dim(net(t_min), images, samples=SAMPLES, **told)
        name = f"the same at t_min = {t_min:g} (above: {model.sde.t_min:g})"
        rows.append((name, found.value - base.value, f"bits/dim {found.value:.3f}"))
    found = bits_per_dim(model, images, samples=SAMPLES, dequantization=TruncatedNormal(), **told)
    rows.append(
        ("truncated normal in place of uniform", found.value - base.value, f"bits/dim {found.value:.3f}; trained with uniform")
    )
    bound = elbo(model, images, levels=256, samples=64, seeds=seeds, microbatch=16)
    error = float(bound.stderr.square().sum().sqrt()) / N * NAT
    rows.append(
        ("elbo in place of the flow", float(bound.bits_per_dim.mean()) - base.value, f"64 evaluations; ± {error:.3f} by its draws")
    )
    return [
        {"term": name, "bits/dim": f"{value:.5f}" if abs(value) < 0.05 else f"{value:.3f}", "how": how} for name, value, how in rows
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = measured()
    names = ("term", "bits/dim", "how")
    table = compare.table([{name: row[name] for name in names} for row in rows], {name: "{" + name + "}" for name in names})
    info = {"torch": torch.__version__, "scoresde": version("scoresde"), "processor": processor(), "seeds": f"0 .. {N - 1}"}
    OUT.write_text(json.dumps({"info": info, "rows": rows}, indent=1) + "\n")
    print(info, table, sep="\n")
    fill(ROOT / "docs/likelihood.md", "likelihood-budget", table)


if __name__ == "__main__":
    main()
