"""Means and covariances as .npz files, in the form that others read and write: `mu`, `sigma` and the number of samples `n`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from scoresde.metrics.frechet import TOLERANCE, Statistics
from scoresde.metrics.inputs import tensor

__all__ = ["Gaussian", "from_npz", "to_npz"]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What a Fréchet distance asks of a set of features, read from a file.

    Args:
        n: how many samples it is of; None: the file does not say.
        mean: [D] float64.
        cov: [D, D] float64.
        facts: what else the file says of itself, such as the hash of the features.
    """

    n: int | None
    mean: Tensor
    cov: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)


def to_npz(statistics: Statistics, **facts: Any) -> bytes:
    """The bytes of an .npz file with mu [D], sigma [D, D], n and, as JSON, facts.

    Raises:
        ValueError: fewer than 2 samples.
    """
    file = io.BytesIO()
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.cov.numpy(), "n": np.int64(statistics.n)}
    np.savez(file, **arrays, facts=np.array(json.dumps(facts, allow_nan=False)))
    return file.getvalue()


def from_npz(path: Path) -> Gaussian:
    """The Gaussian in a file with mu and sigma; n and facts where it has them; nothing is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or its numbers are no mean and covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("mu", "sigma", "n", "facts") if name in file}
        facts = dict(json.loads(str(found.pop("facts", "{}")), parse_constant=_refuse))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # numpy and zipfile raise all kinds at what is no such file
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); wanted an .npz file of mu and sigma") from error
    for name in ("features", "features_sha256"):
        if not isinstance(facts.get(name, ""), str):
            raise ValueError(f"{path} says of its features that {name} is {facts[name]!r}; wanted a text")
    if missing := [name for name in ("mu", "sigma") if name not in found]:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; wanted an .npz file of mu [D], sigma [D, D] and n")
    if any(value.dtype.kind not in "fiu" for value in found.values()):
        kinds = ", ".join(f"{name} is {value.dtype}" for name, value in found.items())
        raise ValueError(f"{path}: {kinds}; wanted numbers")
    with np.errstate(over="ignore"):
        found = {name: np.asarray(value, np.float64) for name, value in found.items()}
    mean, cov = tensor(found["mu"], f"mu of {path}", 1), tensor(found["sigma"], f"sigma of {path}", 2)
    if not len(mean) or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"{path} has mu {list(mean.shape)} and sigma {list(cov.shape)}; wanted [D] and [D, D]")
    largest = float(cov.abs().max())
    if not bool(torch.isfinite(mean.square().sum() + cov.trace() + largest**0.5 * len(mean))):
        raise ValueError(f"{path} has numbers up to {max(float(mean.abs().max()), largest):.3g}, whose squares are beyond float64")
    if (apart := float((cov - cov.T).abs().max())) > TOLERANCE * largest:
        raise ValueError(f"sigma of {path} differs from its transpose by {apart:.3g}; wanted a covariance: (sigma + sigma.T) / 2")
    if (least := float(cov.diagonal().min())) < -TOLERANCE * largest:
        raise ValueError(f"sigma of {path} has {least:.3g} on its diagonal; wanted a covariance, whose diagonal has none below 0")
    return Gaussian(_count(found["n"], path) if "n" in found else None, mean, cov, facts)


def _count(n: np.ndarray, path: Path) -> int:
    if n.size != 1 or not 2 <= (value := float(n.reshape(()))) <= 2**53 or value != int(value):
        raise ValueError(f"{path} says n is {n.tolist()}; wanted the number of samples, a whole number of at least 2, or no n")
    return int(value)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"facts have {name}, which is no JSON")
