"""Distances between two sets of samples; they know nothing of diffusion."""

from scoresde.metrics.classifier import classifier, train_classifier
from scoresde.metrics.features import Features, ModuleFeatures
from scoresde.metrics.frechet import Statistics, Terms, fid, frechet_distance, frechet_terms
from scoresde.metrics.saved import Gaussian, from_npz, to_npz
from scoresde.metrics.wasserstein import gaussian_wasserstein, sliced_wasserstein

__all__ = [
    "Features",
    "Gaussian",
    "ModuleFeatures",
    "Statistics",
    "Terms",
    "classifier",
    "fid",
    "frechet_distance",
    "frechet_terms",
    "from_npz",
    "gaussian_wasserstein",
    "sliced_wasserstein",
    "to_npz",
    "train_classifier",
]
