"""From Fashion-MNIST to a score: two networks trained by `scoresde train`, their weights, samples and FID@5k with its floor.

scoresde train benchmarks/fashion-vp.yaml --out runs/fashion-vp      an hour to an hour and a half each, on one core; resumable
scoresde train benchmarks/fashion-ve.yaml --out runs/fashion-ve
python benchmarks/end_to_end.py features     the classifier whose 64 numbers before its last layer are compared (minutes)
python benchmarks/end_to_end.py export       the averages as float16 into weights/fashion-vp and weights/fashion-ve
python benchmarks/end_to_end.py score        5,000 samples of each, FID@5k against the 10,000 test images: results/end_to_end.json

All of it together is `python benchmarks/end_to_end.py all` once the two trainings are done. The FID is in the features of a small
classifier of Fashion-MNIST, not in Inception's: numbers compare within this table alone.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import cells
import torch
from torch import Tensor

import scoresde
from scoresde import checkpoint, datasets, figures, generate, metrics, reports
from scoresde.metrics import ModuleFeatures, classifier, train_classifier
from scoresde.reports import Scale, Scorer

HERE = Path(__file__).parent
WEIGHTS, OUT, DOCS = HERE / "weights", HERE / "results/end_to_end.json", HERE.parent / "docs/images"
FEATURES = WEIGHTS / "fashion-classifier"
NAMES = ("vp", "ve")
COUNT, NFE, SEEDS = 5000, 20, 0
CELLS = scoresde.Quantized(256)


def images(part: str) -> tuple[Tensor, Tensor]:
    """(images in [-1, 1], labels)."""
    source = datasets.fashion_mnist(part=part)
    return Scale(CELLS).seen(source.x[:]), torch.from_numpy(source.labels)


def features() -> ModuleFeatures:
    """Train the classifier on the training images, 3 epochs, and save it with its accuracy on the test images."""
    x, labels = images("train")
    net, started = classifier((1, 28, 28), 10, seed=0), time.perf_counter()
    train_classifier(net, x, labels, epochs=3)
    seconds = time.perf_counter() - started
    x, labels = images("test")
    with torch.no_grad():
        accuracy = float((torch.cat([net(part).argmax(1) for part in x.split(500)]) == labels).double().mean())
    facts = {
        "accuracy": accuracy,
        "epochs": 3,
        "seed": 0,
        "seconds": round(seconds),
        "command": "python benchmarks/end_to_end.py features",
    }
    reports.save_features(FEATURES, "fashion-cnn-64", net, shape=[1, 28, 28], classes=10, features=64, **facts)
    found = reports.load_features(FEATURES)
    print(f"classifier: {accuracy:.4f} of the test images right; features {found.sha256[:8]}", flush=True)
    return found


def export() -> None:
    """The average of each finished training, in float16; the curves of both."""
    curves, levels = {}, {}
    for name in NAMES:
        run = HERE.parent / f"runs/fashion-{name}"
        summary = json.loads((run / "summary.json").read_text())
        checkpoint.save(WEIGHTS / f"fashion-{name}", checkpoint.load(run), dtype=torch.float16, overwrite=True)
        made = {
            "command": f"scoresde train benchmarks/fashion-{name}.yaml --out runs/fashion-{name}",
            "config": (run / "config.yaml").read_text(), "summary": summary, **json.loads((run / "environment.json").read_text()),
        }  # fmt: skip
        (WEIGHTS / f"fashion-{name}.json").write_text(json.dumps(made, indent=1) + "\n")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[f"{name.upper()}, training"] = [(r["step"], r["loss"]) for r in rows if "loss" in r]
        rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        levels[name.upper()] = [(r["logsnr"], r["loss"]) for r in rows if r["step"] == summary["step"]]
        print(name, summary, sum(p.stat().st_size for p in (WEIGHTS / f"fashion-{name}").iterdir()), "bytes", flush=True)
    figures.curve(DOCS / "fashion_loss.png", curves, "loss (edm)")
    figures.curve(DOCS / "fashion_levels.png", levels, "loss of 256 images held out", "logsnr")


def score() -> None:
    """Sample with the command of the library, compare, and draw."""
    found: dict[str, Any] = cells.machine()
    extractor, scale = reports.load_features(FEATURES), Scale(CELLS)
    reference, _ = images("test")
    scorer = Scorer(extractor, reference, scale, COUNT)
    real, _ = images("train")
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    floors = [scorer(real[order[i * COUNT : (i + 1) * COUNT]]) for i in range(8)]
    floor = sum(floors) / len(floors)
    spread = (sum((v - floor) ** 2 for v in floors) / (len(floors) - 1)) ** 0.5
    accuracy = json.loads((FEATURES / "config.json").read_text())["accuracy"]
    found["record"] = scorer.record(floor, floor_sd=spread, floors="8 disjoint sets of 5,000 training images", of="10,000 test images",
                                    nfe=NFE, quantizer="rounded to 256 levels", accuracy=accuracy)  # fmt: skip
    print(f"floor {floor:.3f} +- {spread:.3f}", flush=True)
    found["networks"] = {}
    for name in NAMES:
        settings = generate.Settings(seeds=generate.parse_seeds(f"{SEEDS}-{SEEDS + COUNT - 1}"), nfe=NFE, format="npz", batch=100)
        out = HERE.parent / f"runs/fashion-{name}-samples"
        summary = generate.run(WEIGHTS / f"fashion-{name}", out, settings, processes=2)
        x = torch.cat([torch.from_numpy(x) for x in shards(out)])
        value = scorer(CELLS.to_model(x))
        pixels = metrics.sliced_wasserstein(CELLS.to_model(x[: len(reference)]).flatten(1), reference[: len(x)].flatten(1))
        found["networks"][name] = {
            "fid@5000": value, "sliced_wasserstein_pixels": float(pixels), "nfe": summary["nfe"], "solver": summary["solver"],
            "seconds": summary["run"]["seconds"], "training": json.loads((WEIGHTS / f"fashion-{name}.json").read_text())["summary"],
        }  # fmt: skip
        print(name, found["networks"][name], flush=True)
        (DOCS / f"fashion_{name}.png").write_bytes(figures.png(figures.sheet(x[:64].numpy(), 16)))
    OUT.write_text(json.dumps(found, indent=1) + "\n")


def shards(folder: Path) -> list[Any]:
    """The arrays of a folder of samples, in the order of their seeds."""
    import numpy as np

    return [np.load(path, allow_pickle=False)["x"] for path in sorted(folder.glob("samples-*.npz"))]


def main() -> None:
    torch.set_num_threads(1)
    steps = {"features": features, "export": export, "score": score}
    asked = sys.argv[1] if len(sys.argv) > 1 else "all"
    if asked not in (*steps, "all"):
        raise SystemExit(f"{asked!r} is none of {', '.join(steps)}, all")
    for name, step in steps.items():
        if asked in (name, "all"):
            step()


if __name__ == "__main__":
    main()
