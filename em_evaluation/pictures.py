"""The report's grids of images, and the images of its quiz, which the page shows nowhere else."""

import numpy as np

from em_data.views import ELEMENTS, apply_symmetry
from em_evaluation.quiz import NUM_QUIZ_IMAGES

SAME_TILES = ("reconstruction", "surrogates")  # made from the real images of their grid


def choose_pictures(sets, num_pictures: int, gallery=(), seed=0) -> list[dict]:
    """Return the grids: the first images of each set, not selected, and after them `gallery`.

    Those of held-out images and of models have, as `unseen`, images for the quiz.
    """

    def picture(key, title, caption, images, role):
        levels = images.levels[:num_pictures, 0]
        return {"key": key, "title": title, "caption": caption, "levels": levels, "role": role}

    held_out = picture(
        "held_out", "Real", "what the models are compared with", sets.held_out, "real"
    )
    pictures = [held_out]
    pictures += [
        picture(name, name, "generated", images, "model") for name, images in sets.generated.items()
    ]
    if sets.train is not None:
        pictures.append(picture("train", "Real, trained on", "training tiles", sets.train, "level"))
    for level in sets.levels:
        if level.kind != "real":
            caption = level.description
            if level.kind in SAME_TILES and sets.train is not None:
                caption = "made from the training tiles shown here"
            pictures.append(picture(level.key, level.title, caption, level.images, "level"))
    pictures += gallery
    shown = [image for each in pictures for image in each["levels"]]
    for each, images in zip(pictures, (sets.held_out, *sets.generated.values())):
        each["unseen"] = choose_unseen(images.levels[:, 0], shown, seed)
    return pictures


def choose_unseen(levels, shown, seed=0, most=NUM_QUIZ_IMAGES):
    """Draw at most `most` different images from uint8 [N, H, W], none of which is in `shown`.

    Images that are turned or flipped count as the same.
    """
    known, chosen = {_name_content(image) for image in shown}, []
    for i in np.random.default_rng(seed).permutation(len(levels)):
        name = _name_content(levels[i])
        if name not in known:
            known.add(name)
            chosen.append(i)
        if len(chosen) == most:
            break
    return levels[np.array(chosen, int)]


def _name_content(image) -> bytes:
    """Return what an image [H, W] shares with its eight symmetries only."""
    return min(np.ascontiguousarray(apply_symmetry(image, name)).tobytes() for name in ELEMENTS)
