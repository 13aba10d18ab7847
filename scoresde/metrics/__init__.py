"""Distances between two sets of samples; they know nothing of diffusion."""

from scoresde.metrics.classifier import classifier, train_classifier
from scoresde.metrics.features import Features, ModuleFeatures
from scoresde.metrics.frechet import Statistics, fid, frechet_distance
from scoresde.metrics.wasserstein import gaussian_wasserstein, sliced_wasserstein

__all__ = [
    "Features",
    "ModuleFeatures",
    "Statistics",
    "classifier",
    "fid",
    "frechet_distance",
    "gaussian_wasserstein",
    "sliced_wasserstein",
    "train_classifier",
]
