"""A sampler as a point: its distance to held-out micrographs and its images/s."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from em_data import load_data, to_uint8
from em_evaluation import get_extractor
from em_evaluation.distances import (
    Interval,
    bootstrap_interval,
    difference_interval,
    frechet_influence,
)
from em_evaluation.feature_cache import compute_features
from em_evaluation.images import ImageSet, read_images
from em_generation.candidates import name_candidates
from em_generation.evaluate import EvaluationConfig, find_data, refuse_other_splits
from em_generation.sampling import draw_images


@dataclass
class Reference:
    """Held-out tiles as features [N, D], with the micrograph of each, and what made them."""

    features: np.ndarray
    groups: np.ndarray | None
    extractor: object
    num_images: int
    data: str

    def measure(self, images):
        """Return the Frechet distance of images uint8 [N, 1, H, W], with the influence of each."""
        return frechet_influence(self.extract(images), self.features)

    def extract(self, images):
        return compute_features(ImageSet(images), self.extractor, use_cache=False)

    def interval(self, distance) -> Interval:
        return bootstrap_interval(distance, groups_b=self.groups)

    def difference(self, first, second) -> Interval:
        """Return the interval of the difference of two distances of images from the same noise."""
        return difference_interval(first, second, groups_reference=self.groups, paired=True)


def load_reference(
    model: str, num_images: int, *, data=None, tiles=(), seed=0, device="cpu", log=print
) -> Reference:
    """Read at most `num_images` held-out tiles of a model's data; errors as in evaluate.py."""
    models = name_candidates((model,))
    source, tiling = find_data(
        EvaluationConfig(models=(model,), data=data, tiles=tuple(tiles)), models
    )
    loaded = load_data(source, tiling, log=log)
    refuse_other_splits(models, loaded.summary)
    num_images = min(num_images, loaded.held_out.num_views)
    extractor = get_extractor(resolution=loaded.summary["resolution"], device=device)
    images = read_images(loaded.held_out, num_images, seed)
    features = compute_features(images, extractor)
    return Reference(features, images.groups, extractor, num_images, loaded.summary["name"])


def sample_levels(drawer, num_images: int, batch_size: int, clock=None) -> tuple[np.ndarray, float]:
    """Draw images as generate.py does, without writing; return (uint8 [N, 1, H, W], seconds)."""
    clock = clock or choose_clock(drawer.pipeline.device)
    levels: dict[int, np.ndarray] = {}

    def write(numbers, images):
        levels.update(zip(numbers, to_uint8(images), strict=True))
        return len(images)

    started = clock()
    draw_images(drawer, range(num_images), write, batch_size=batch_size)
    return np.stack([levels[i] for i in range(num_images)]), clock() - started


def choose_clock(device):
    """Return the clock: on one thread of a CPU, the process's own time, else wall time."""
    return (
        time.process_time
        if torch.device(device).type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )


def is_as_good(difference: Interval, reference: Interval) -> bool:
    """Return whether a point is as good as the reference.

    The difference, at its upper end, is at most what the reference is uncertain upwards.
    """
    return difference.high <= reference.high - reference.value
