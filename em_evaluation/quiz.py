"""The page's quiz, real or generated, with images that the page shows nowhere else."""

import numpy as np

from em_data.figures import make_data_uri

NUM_QUIZ_IMAGES = 24  # at most, half of them real
FEWEST = 4  # of either kind


def make_quiz(pictures, seed=0) -> dict | None:
    """Return real and generated images in random order as one PNG strip; None if there are too few.

    pictures: those of `evaluate_models`, with their `unseen` images; as many of each model.
    origins: for each image "" if it is real, else the model's name.
    """
    real = [picture["unseen"] for picture in pictures if picture["role"] == "real"]
    models = [
        (picture["title"], picture["unseen"]) for picture in pictures if picture["role"] == "model"
    ]
    if not real or not models:
        return None
    share = min([NUM_QUIZ_IMAGES // 2 // len(models), *(len(levels) for _, levels in models)])
    share = min(share, len(real[0]) // len(models))
    if share * len(models) < FEWEST:
        return None
    images = list(real[0][: share * len(models)]) + [
        level for _, levels in models for level in levels[:share]
    ]
    origins = [""] * (share * len(models)) + [name for name, _ in models for _ in range(share)]
    order = np.random.default_rng(seed).permutation(len(images))
    strip = np.concatenate([images[i] for i in order], axis=1)  # uint8 [H, N W]
    return {
        "uri": make_data_uri(strip),
        "height": strip.shape[0],
        "width": strip.shape[1] // len(images),
        "origins": [origins[i] for i in order],
    }
